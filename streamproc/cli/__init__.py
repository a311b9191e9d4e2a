"""The `streamproc` command: `worker`, `topics`, `lag`, `reset`. One module each; what the user did wrong is one message
and exit code 1, never a traceback."""

from streamproc.cli.main import main

__all__ = ["main"]
