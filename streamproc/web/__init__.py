"""The web view: live tables, tasks, dead letters and late records, as pages and as JSON. Committed state only.

`install` mounts it on the web server that Faust runs.
"""

from __future__ import annotations

from typing import Any

from streamproc.web.security import chosen_token
from streamproc.web.views import Views

__all__ = ["chosen_token", "install"]


def install(app: Any, server: Any, token: str | None = None) -> None:
    """Mount the view of ``app`` on Faust's web ``server``, before that starts, on the app's own loop.

    ``token`` (else STREAMPROC_WEB_TOKEN) is what a request must show; `UserError` if there is none and the server is
    bound to anything but loopback.
    """
    Views(app, chosen_token(app.conf, token)).mount(server.web_app)
