"""For tests of applications: `simulate` and `Driver` run them in virtual time, `FakeSink` takes what they write."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamproc.testing.fake_sink import FakeSink
    from streamproc.testing.simulation.application import Record
    from streamproc.testing.simulation.driver import Driver
    from streamproc.testing.simulation.kit import Report, simulate
    from streamproc.testing.simulation.outcome import Outcome

__all__ = ["Driver", "FakeSink", "Outcome", "Record", "Report", "simulate"]

_HOME = {
    "Driver": "simulation.driver",
    "FakeSink": "fake_sink",
    "Outcome": "simulation.outcome",
    "Record": "simulation.application",
    "Report": "simulation.kit",
    "simulate": "simulation.kit",
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for: a test that starts a broker needs no simulation."""
    if name not in _HOME:
        raise AttributeError(f"module 'streamproc.testing' has no attribute {name!r}")
    return getattr(import_module(f"streamproc.testing.{_HOME[name]}"), name)
