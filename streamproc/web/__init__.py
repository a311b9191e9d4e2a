"""The web view: live tables, tasks, dead letters and late records, as pages and as JSON. Committed state only.

`install` mounts it on the web server that Faust runs.
"""

from __future__ import annotations

from typing import Any, Final

from aiohttp.web import AppKey

from streamproc.web.security import chosen_token
from streamproc.web.views import Views

__all__ = ["install"]

_MOUNTED: Final = AppKey("streamproc", Views)


def install(app: Any, server: Any, token: str | None = None) -> None:
    """Mount the view of ``app`` on Faust's web ``server`` before that starts. Once is enough, and twice does no harm:
    Faust's command line makes the server ready before the worker does.

    ``token`` (else STREAMPROC_WEB_TOKEN) is what a request must show. Without one the server's start raises `UserError`
    if it is bound to anything but loopback.
    """
    if _MOUNTED not in server.web_app:
        server.web_app[_MOUNTED] = views = Views(app, chosen_token(token))
        views.mount(server.web_app)
