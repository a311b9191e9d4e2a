"""Who may look at the web view: loopback without a token, anybody else with one; nothing else is told to anybody."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from streamproc.core import limits
from streamproc.core.errors import UserError
from streamproc.web.security import chosen_token, is_loopback
from tests.apps import new_app, running
from tests.web import Client, client, free_port

TOKEN = "s3cret-t0ken"
PATHS = ("/", "/api/overview", "/api/events", "/streamproc/", "/streamproc/static/main.js", "/router/", "/nowhere")


def ask(folder: Path, questions: Callable[[Client], Awaitable[None]], **options: object) -> None:
    app = new_app(folder, web_enabled=True, web_port=free_port(), **options)

    async def scenario() -> None:
        async with running(app), client(app) as asking:
            await questions(asking)

    asyncio.run(scenario())


@pytest.fixture(autouse=True)
def _no_token_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMPROC_WEB_TOKEN", raising=False)


def test_without_a_token_only_names_of_this_machine_are_answered(tmp_path: Path) -> None:
    async def questions(asking: Client) -> None:
        for host in ("localhost", "127.0.0.1:1234", "[::1]:80", "app.localhost"):
            assert (await asking.get("/api/overview", {"Host": host})).status == 200, host
        # A foreign site's name that was pointed at this address (DNS rebinding).
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "[::", "a b"):
            for path in ("/api/overview", "/", "/streamproc/"):
                answer = await asking.get(path, {"Host": host})
                assert answer.status in (400, 403), host
                assert "tables" not in answer.text or answer.status == 400

    ask(tmp_path, questions)


def test_with_a_token_nothing_is_told_without_it(tmp_path: Path) -> None:
    async def questions(asking: Client) -> None:
        wrong = [{}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {TOKEN}"}, {"Cookie": f"streamproc_web={TOKEN}"},
                 {"Authorization": "Bearer \u00fc"}, {"Cookie": "streamproc_web="}]  # fmt: skip
        for path in PATHS:
            for headers in wrong:
                answer = await asking.get(path, headers)
                assert (answer.status, answer.headers["WWW-Authenticate"][:6]) == (401, "Bearer"), (path, headers)
                assert TOKEN not in answer.text
            assert (await asking.get(path, token="guess")).status == 401
        # With a token the name does not matter: a proxy in front may have any.
        for path in ("/api/overview", "/streamproc/", "/", "/router/"):
            good = await asking.get(path, {"Authorization": f"Bearer {TOKEN}", "Host": "stream.example"})
            assert good.status == 200

    ask(tmp_path, questions, web_token=TOKEN)


def test_a_page_opened_with_the_token_keeps_a_cookie_and_loses_the_token(tmp_path: Path) -> None:
    async def questions(asking: Client) -> None:
        opened = await asking.get("/streamproc/tables/x", token=TOKEN, a="1")
        assert (opened.status, opened.headers["Location"]) == (302, "/streamproc/tables/x?a=1")
        cookie = opened.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        shown = {"Cookie": cookie.partition(";")[0]}
        asking.session.cookie_jar.clear()
        assert (await asking.get("/api/overview", shown)).status == 200
        # A script may put it into the address; there is no page to be led to.
        asking.session.cookie_jar.clear()
        assert (await asking.get("/api/overview", token=TOKEN)).status == 200
        elsewhere = await asking.get("//evil.example/", token=TOKEN)
        assert elsewhere.headers["Location"].startswith("/evil.example")

    ask(tmp_path, questions, web_token=TOKEN)


def test_every_answer_has_the_security_headers(tmp_path: Path) -> None:
    async def questions(asking: Client) -> None:
        for path in ("/", "/api/overview", "/api/nothing", "/streamproc/", "/streamproc/static/style.css"):
            headers = (await asking.get(path)).headers
            assert headers["Content-Security-Policy"].startswith("default-src 'self'")
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"

    ask(tmp_path, questions)


def test_pages_kept_up_to_date_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WEB_STREAMS_MAX", 2)

    async def questions(asking: Client) -> None:
        opened = [await asking.session.get(asking.url + "/api/events") for _ in range(2)]
        refused = await asking.get("/api/events")
        assert (refused.status, "Close one" in refused.text) == (503, True)
        for events in opened:
            events.close()
        for _ in range(300):
            events = await asking.session.get(asking.url + "/api/events")
            events.close()
            if events.status == 200:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("a closed page still counts")

    ask(tmp_path, questions)


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("LOCALHOST.", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("", False), ("localhost.example", False),
     ("127.0.0.1.nip.io", False)],
)  # fmt: skip
def test_what_counts_as_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_a_token_comes_from_the_app_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_token(None) is None
    monkeypatch.setenv("STREAMPROC_WEB_TOKEN", "from-outside")
    assert (chosen_token(None), chosen_token("mine")) == ("from-outside", "mine")
    with pytest.raises(UserError, match="token_urlsafe"):
        chosen_token("ein schlüssel")


@pytest.mark.parametrize(("bind", "token", "starts"), [("0.0.0.0", "", False), ("0.0.0.0", TOKEN, True)])
def test_a_worker_open_to_the_network_needs_a_token(tmp_path: Path, bind: str, token: str, starts: bool) -> None:
    (tmp_path / "opened.py").write_text(
        f"import streamproc as sp\n"
        f"app = sp.App('opened', broker='embedded://{tmp_path}/log', datadir='{tmp_path}/state',"
        f" web_bind='{bind}', web_port={free_port()})\n"
        "@app.task\n"
        "async def ended():\n"
        "    await app.runtime.ready.wait()\n"
        "    print('it started', flush=True)\n"
        "    await app.stop()\n"
    )
    environment = {**os.environ, "STREAMPROC_WEB_TOKEN": token}
    worker = subprocess.Popen(
        [Path(sys.executable).with_name("faust"), "-A", "opened", "worker", "-l", "warn"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert worker.stdout is not None
    try:
        if starts:
            assert any("it started" in line for line in worker.stdout)
        else:
            said, _ = worker.communicate(timeout=30)
            assert worker.returncode == 1
            assert "web_bind='0.0.0.0'" in said
            assert "STREAMPROC_WEB_TOKEN" in said
            assert "Traceback" not in said
    finally:
        worker.terminate()
        worker.wait(timeout=30)
