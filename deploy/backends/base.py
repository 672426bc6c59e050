"""What the supervisor asks of the place where processes run: start, exit code, stop, remains of one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pdserve.deploy.plan import Process


@dataclass(frozen=True)
class Handle:
    """A started process. `created` (its start time) tells it from a later process that was given the same pid."""

    name: str
    pid: int
    created: float


class Backend(Protocol):
    """Runs processes in one place (this machine, a cluster). No method raises because a process is gone.

    A process brings children (an engine's workers). They belong to it: `kill` and `remains` speak of all of them.
    """

    def start(self, process: Process) -> Handle:
        """Starts it, its output appended to `process.log`. Raises StartError when the command cannot be run at all."""

    def exit_code(self, handle: Handle) -> int | None:
        """None while the process itself runs; negative when a signal ended it. Its children may still be there."""

    def interrupt(self, handle: Handle) -> None:
        """Asks the process to end in its own way, children included."""

    def kill(self, handle: Handle) -> None:
        """Ends the process and all that it started, the children being asked first; waits a few seconds at most."""

    def remains(self, handle: Handle) -> list[int]:
        """The pids of the process and its descendants that are still alive."""
