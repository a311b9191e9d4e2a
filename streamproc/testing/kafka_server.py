"""A real Apache Kafka for tests and benchmarks: one KRaft node on loopback, in a temporary folder, on free ports.

Needs Java 17 and, the first time, Maven: it fetches the jars named in ``kafka/pom.xml`` to `KAFKA_LIBS` (a temporary
folder by default). With `KAFKA_BOOTSTRAP` set, that broker is used and nothing is started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final

from streamproc.core.clock import SystemClock
from streamproc.core.errors import UserError

__all__ = ["KafkaServer", "can_start"]

START_S_MAX: Final = 90.0
"""From exec to 'started'; 3 to 5 s on an idle machine."""
STOP_S_MAX: Final = 30.0
FETCH_S_MAX: Final = 600.0
"""Maven's download of 43 MB."""
HEAP: Final = "768m"
_HERE: Final = Path(__file__).parent / "kafka"
_CLUSTER_ID: Final = "AAAAAAAAQACAAAAAAAAAAQ"
_STARTED: Final = b"Kafka Server started"


def can_start() -> bool:
    """Whether this machine has what `KafkaServer.start` needs; a test that asks may skip."""
    if os.environ.get("KAFKA_BOOTSTRAP"):
        return True
    return shutil.which("java") is not None and (_libs().is_dir() or shutil.which("mvn") is not None)


class KafkaServer:
    """``with KafkaServer() as kafka: … kafka.bootstrap``.

    The data outlive `kill` and `restart` and go with `stop`. An outside broker (`KAFKA_BOOTSTRAP`) cannot be killed or
    restarted: `UserError`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._outside = os.environ.get("KAFKA_BOOTSTRAP", "")
        self._folder = folder
        self._temporary: Path | None = None
        self._ports: tuple[int, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> KafkaServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def bootstrap(self) -> str:
        if self._outside:
            return self._outside
        if self._ports is None:
            raise UserError("KafkaServer has no address before start().", remedy="Call start() first.")
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def pid(self) -> int | None:
        """Of the running broker; None for an outside one or when it is down."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Return when the broker answers. Raises `UserError` with the end of its log when it does not come up."""
        if self._outside or self._process:
            return
        folder = self._prepare()
        log = folder / "broker.out"
        heap, quiet = f"-Xmx{os.environ.get('KAFKA_HEAP', HEAP)}", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
        said = "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info"
        with log.open("ab") as out:
            seen = out.tell()
            self._process = subprocess.Popen(
                [_java(), heap, "-XX:+UseG1GC", quiet, said, "-Dlog4j2.level=OFF", "-cp", f"{_libs()}/*", "kafka.Kafka",
                 str(folder / "server.properties")],
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._wait_until_started(self._process, log, seen)

    def stop(self) -> None:
        """Stop the broker and remove its temporary folder. Safe to call twice."""
        self._end(signal.SIGTERM)
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = self._ports = None

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        self._refuse_outside("killed")
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, until `go_on`."""
        self._refuse_outside("paused")
        self._signal(signal.SIGSTOP)
        if self._process:
            # The signal arrives in its own time: return when every thread of the broker stands.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Same ports, same data; a running broker is stopped first."""
        self._refuse_outside("restarted")
        self._end(signal.SIGTERM)
        self.start()

    def _refuse_outside(self, what: str) -> None:
        if self._outside:
            raise UserError(
                f"The broker at {self._outside} cannot be {what} from here.",
                remedy="Unset KAFKA_BOOTSTRAP to let the tests start their own.",
            )

    def _signal(self, number: signal.Signals) -> None:
        if self._process:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(timeout=STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=STOP_S_MAX)

    def _prepare(self) -> Path:
        """Folder, ports, properties and a formatted log directory: all of them once per server."""
        _fetch_jars()
        if self._folder is None and self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="streamproc-kafka-"))
        folder = self._folder or self._temporary
        assert folder is not None  # for the type checker: one of the two was just made
        folder.mkdir(parents=True, exist_ok=True)
        self._ports = self._ports or _free_ports()
        properties = folder / "server.properties"
        properties.write_text(_properties(folder / "log", *self._ports))
        if not (folder / "log" / "meta.properties").exists():
            _run(
                [
                    _java(),
                    "-cp",
                    f"{_libs()}/*",
                    "kafka.tools.StorageTool",
                    "format",
                    "-t",
                    _CLUSTER_ID,
                    "-c",
                    str(properties),
                ]
            )
        return folder

    def _wait_until_started(self, process: subprocess.Popen[bytes], log: Path, seen: int) -> None:
        clock = SystemClock()
        until = clock.monotonic_s() + START_S_MAX
        while clock.monotonic_s() < until:
            # Waiting for the process to end is the pause between two looks: a broker that dies is seen at once.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
            if process.poll() is not None:
                break
            if _STARTED in log.read_bytes()[seen:]:
                return
        self._end(signal.SIGKILL)
        tail = log.read_text(errors="replace")[-2000:]
        raise UserError(f"Kafka did not start within {START_S_MAX:.0f} s:\n{tail}", remedy=f"Its log is {log}.")


def _libs() -> Path:
    return Path(os.environ.get("KAFKA_LIBS") or Path(tempfile.gettempdir()) / "streamproc-kafka-4.1.1")


def _java() -> str:
    found = shutil.which("java")
    if found is None:
        raise UserError(
            "No `java` on the PATH: a real Kafka cannot be started.",
            remedy="Install a Java 17 runtime and Maven, or set KAFKA_BOOTSTRAP to a running broker.",
        )
    return found


def _fetch_jars() -> None:
    """To a temporary name first: a half-filled folder would count as complete."""
    libs = _libs()
    if libs.is_dir():
        return
    maven = shutil.which("mvn")
    if maven is None:
        raise UserError(
            f"The jars of Kafka are not in {libs} and there is no `mvn` on the PATH to fetch them.",
            remedy="Install Maven, or set KAFKA_LIBS to a folder with them, or KAFKA_BOOTSTRAP to a running broker.",
        )
    libs.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=libs.name + ".", dir=libs.parent))
    _run(
        [maven, "-q", "-B", "-f", str(_HERE / "pom.xml"), "dependency:copy-dependencies", "-DincludeScope=runtime",
         f"-DoutputDirectory={partial}"],
    )  # fmt: skip
    try:
        partial.rename(libs)
    except OSError:
        # Somebody else was faster; theirs is as good, or the reason shows when java looks for its classes.
        shutil.rmtree(partial, ignore_errors=True)
        if not libs.is_dir():
            raise


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S_MAX, check=False)
    if done.returncode:
        raise UserError(
            f"`{' '.join(command)}` ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}",
            remedy="Run it by hand to see why.",
        )


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def _properties(log: Path, port: int, controller: int) -> str:
    """Small internal topics, no waiting for members, and a cleaner and transaction reaper that act within a test."""
    return f"""\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={log}
num.partitions=4
auto.create.topics.enable=false
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
log.cleaner.dedupe.buffer.size=16777216
log.cleaner.backoff.ms=200
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
"""
