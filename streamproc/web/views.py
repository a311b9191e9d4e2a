"""Which address gives what. Pages under ``/streamproc/``, JSON under ``/api/``; everything else stays Faust's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from importlib.resources import files
from typing import Any, Final

from aiohttp import web

from streamproc.core.errors import Retryable, StreamprocError
from streamproc.runtime.inspect import Inspector
from streamproc.web.answers import Question, Refused, encode
from streamproc.web.fresh import Fresh
from streamproc.web.live import Live
from streamproc.web.overview import Overview
from streamproc.web.security import HEADERS, PARAMETER, Guard, Handler, refusal, require_token
from streamproc.web.side import Side
from streamproc.web.tables import Tables
from streamproc.web.workers import HOP, Workers

__all__ = ["Views"]

logger = logging.getLogger(__name__)

PAGES: Final = "/streamproc"
TYPES: Final = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
Answer = Callable[[web.Request, Question, bool], Awaitable[Any]]


class Views:
    """Made once per web server, before it starts, perhaps before there is a loop. Answers are worked out on the app's own
    loop, also if Faust runs its web server in a thread: stores and tasks belong to that loop."""

    def __init__(self, app: Any, token: str | None) -> None:
        self._app, self._token = app, token
        inspector, workers = Inspector(app.runtime), Workers(app, token)
        self._tables = Tables(inspector, workers)
        self._overview = Overview(app, inspector, self._tables, workers)
        self._side: Fresh[dict[str, Any]] = Fresh(
            lambda: Side(inspector, app.runtime.transport).read(), app.clock, {"topics": []}
        )
        self._live = Live(lambda: self._on_app_loop(self._overview.read()), app.clock)
        self._files = {
            entry.name: entry.read_bytes()
            for folder in ("static", "templates")
            for entry in (files("streamproc.web") / folder).iterdir()
            if entry.name.rpartition(".")[2] in {*TYPES, "html"}
        }

    def mount(self, server: web.Application) -> None:
        """Add the guard, the routes and what ends with the server."""
        # Outermost: nothing, not even a 404 or a page of Faust's, is told to who may not look.
        server.middlewares.insert(0, web.middleware(Guard(self._app.conf, self._token)))
        server.middlewares.append(_front_page)
        server.on_response_prepare.append(_with_headers)
        server.on_startup.append(self._check)
        server.on_shutdown.append(self._close)
        router = server.router
        for path, answer in self._answers().items():
            router.add_get(path, self._json(answer))
        router.add_get("/api/events", self._live.stream)
        router.add_get("/api/{unknown:.*}", self._json(_unknown))
        router.add_get(f"{PAGES}/static/{{file}}", self._static)
        for path in ("", "/", "/tables/{name}", "/side"):
            router.add_get(PAGES + path, self._page)

    def _answers(self) -> dict[str, Answer]:
        return {
            "/api/overview": self._read_overview,
            "/api/tasks": lambda request, question, local: self._overview.tasks(question, local=local),
            "/api/tables": self._read_tables,
            "/api/side": self._read_side,
            "/api/tables/{name}/rows": lambda request, question, local: self._tables.rows(
                request.match_info["name"], question, local=local),
            "/api/tables/{name}/windows": lambda request, question, local: self._tables.windows(
                request.match_info["name"], question, local=local),
            "/api/tables/{name}/row": self._read_row,
        }  # fmt: skip

    # ---- answers

    async def _read_overview(self, request: web.Request, question: Question, local: bool) -> Any:
        question.done()
        return await self._overview.read()

    async def _read_tables(self, request: web.Request, question: Question, local: bool) -> Any:
        question.done()
        return {"tables": self._tables.declared()}

    async def _read_side(self, request: web.Request, question: Question, local: bool) -> Any:
        question.done()
        return {**await self._side.get(patience_s=5.0), "problem": self._side.problem}

    async def _read_row(self, request: web.Request, question: Question, local: bool) -> Any:
        return await self._tables.row(
            request.match_info["name"], question, dict(self._parameters(request)), hop=HOP in request.headers
        )

    # ---- around them

    def _parameters(self, request: web.Request) -> list[tuple[str, str]]:
        hidden = PARAMETER if self._token is not None else None
        return [(name, value) for name, value in request.query.items() if name != hidden]

    def _json(self, answer: Answer) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                question = Question(self._parameters(request))
                local = HOP in request.headers
                if not request.path.endswith("/row"):  # whose parameters are columns
                    local = question.text("local") == "1" or local
                body = encode(await self._on_app_loop(_made(answer(request, question, local))))
            except Refused as refused:
                return refusal(refused)
            except Retryable as away:
                return refusal(Refused(503, str(away), "Ask again in a moment."))
            except StreamprocError as failure:
                return refusal(Refused(500, str(failure)))
            except Exception:
                # The edge of the process: a bug of ours must not show a stack to who asks, nor end the worker.
                logger.exception("the web view could not answer %s", request.path)
                return refusal(Refused(500, "This question cannot be answered; the worker's log says why."))
            return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})

        return handle

    async def _on_app_loop(self, answer: Coroutine[Any, Any, Any]) -> Any:
        if not self._app.conf.web_in_thread:
            return await answer
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(answer, self._app.loop))

    async def _check(self, server: web.Application) -> None:
        require_token(self._app.conf, self._token)

    async def _close(self, server: web.Application) -> None:
        await self._live.close()
        await self._on_app_loop(self._forget())

    async def _forget(self) -> None:
        self._overview.close()
        self._side.close()

    # ---- pages

    async def _page(self, request: web.Request) -> web.StreamResponse:
        """One page for all addresses; its script reads the address."""
        return web.Response(body=self._files["page.html"], content_type="text/html", charset="utf-8",
                            headers={"Cache-Control": "no-store"})  # fmt: skip

    async def _static(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["file"]
        kind = TYPES.get(name.rpartition(".")[2])
        if kind is None or name not in self._files:
            return refusal(Refused(404, f"There is no file {name!r}."))
        return web.Response(body=self._files[name], content_type=kind, charset="utf-8",
                            headers={"Cache-Control": "no-cache"})  # fmt: skip


@web.middleware
async def _front_page(request: web.Request, handler: Handler) -> web.StreamResponse:
    """``/`` is Faust's, for programs; a browser, which asks for HTML, is led to the page for people."""
    if request.path == "/" and request.method == "GET" and "text/html" in request.headers.get("Accept", ""):
        return web.Response(status=302, headers={"Location": f"{PAGES}/"})
    return await handler(request)


async def _unknown(request: web.Request, question: Question, local: bool) -> Any:
    raise Refused(404, f"There is no {request.path!r}.",
                  "There are /api/overview, /api/tasks, /api/tables, /api/tables/NAME/rows, /api/tables/NAME/windows, "
                  "/api/tables/NAME/row, /api/side and /api/events.")  # fmt: skip


async def _with_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


async def _made(answer: Awaitable[Any]) -> Any:
    return await answer
