"""Who may look: anybody on this machine's loopback, else whoever has the token. Holds for Faust's own pages too."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web

from streamproc.core.errors import UserError
from streamproc.web.answers import Refused, encode

__all__ = ["HEADERS", "Guard", "chosen_token", "is_loopback", "refusal", "require_token"]

ENVIRONMENT: Final = "STREAMPROC_WEB_TOKEN"
COOKIE: Final = "streamproc_web"
PARAMETER: Final = "token"
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host``, or a name in a Host header, is this machine's own."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def chosen_token(given: str | None) -> str | None:
    """The token to ask for; None: nobody has to show one."""
    token = given or os.environ.get(ENVIRONMENT) or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            "web_token has characters that no HTTP header can carry.",
            remedy="Use letters and digits, as python -c 'import secrets; print(secrets.token_urlsafe())' makes them.",
        )
    return token


def require_token(conf: Any, token: str | None) -> None:
    """`UserError` if the server would be open to the network without one. Asked when the server starts, not before: the
    command line may still change where it is bound to."""
    if token is None and str(conf.web_transport.scheme) != "unix" and not is_loopback(conf.web_bind or "0.0.0.0"):
        raise UserError(
            f"web_bind={conf.web_bind!r} shows tables and dead letters to the network, and there is no web_token.",
            remedy=f'Set App(…, web_token="…") or {ENVIRONMENT}, or bind to this machine only: web_bind="127.0.0.1".',
        )


def refusal(refused: Refused) -> web.Response:
    """An error as JSON."""
    return web.Response(status=refused.status, body=encode(refused.body()), content_type="application/json")


class Guard:
    """A middleware of the whole web server."""

    def __init__(self, conf: Any, token: str | None) -> None:
        self._conf, self._token = conf, token
        # The cookie is made from the token and does not tell it.
        self._pass = hmac.new(token.encode(), b"streamproc web", hashlib.sha256).hexdigest() if token else ""

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is None:
            if not self._own_name(request):
                return refusal(Refused(
                    403, f"This server is for this machine only and is not called {request.host!r}.",
                    "Use http://localhost:PORT, or set web_token to make it public."))  # fmt: skip
            return await handler(request)
        given = request.query.get(PARAMETER)
        if given is not None and _same(given, self._token):
            return await self._with_cookie(request, handler)
        if self._may(request):
            return await handler(request)
        response = refusal(Refused(401, "A token is needed.",
                                   "Send `Authorization: Bearer TOKEN`, or open the page once with ?token=TOKEN."))  # fmt: skip
        response.headers["WWW-Authenticate"] = 'Bearer realm="streamproc"'
        return response

    def _own_name(self, request: web.Request) -> bool:
        """A page of another site may point its own name at this address: a browser then says that name as Host."""
        if str(self._conf.web_transport.scheme) == "unix":
            return True
        try:
            name = urlsplit(f"//{request.host}").hostname or ""
        except ValueError:
            return False
        return is_loopback(name)

    def _may(self, request: web.Request) -> bool:
        assert self._token is not None
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(given.strip(), self._token):
            return True
        return _same(request.cookies.get(COOKIE, ""), self._pass)

    async def _with_cookie(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A page is opened again without the token in its address, where history and logs would keep it."""
        if request.path.startswith("/api/") or request.method != "GET":
            return await handler(request)
        # Only the path: a full address could be made to lead elsewhere.
        left = request.rel_url.without_query_params(PARAMETER)
        target = "/" + left.raw_path.lstrip("/") + (f"?{left.raw_query_string}" if left.raw_query_string else "")
        response = web.Response(status=302, headers={"Location": target})
        response.set_cookie(COOKIE, self._pass, httponly=True, samesite="Strict", secure=request.secure, path="/")
        return response


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())
