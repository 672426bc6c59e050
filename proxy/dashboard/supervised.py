"""What the launcher says of the processes that it keeps running, from the file it writes beside their logs."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pdserve import log

_LIMIT = 1024 * 1024
_log = log.get("proxy.dashboard")


class Process(msgspec.Struct):
    name: str
    state: str = ""
    detail: str = ""
    restarts: int = 0
    since: float = 0.0


class _Deployment(msgspec.Struct):
    name: str = ""
    processes: list[Process] = []


class Supervised:
    """Empty where there is no launcher: engines may have been started by anybody."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._seen = (0, 0)
        self._told = False
        self.deployment = ""
        self.processes: dict[str, Process] = {}

    def look(self) -> None:
        """Reads the file if it has changed. A file that cannot be read leaves what was known."""
        if self._path is None:
            return
        try:
            stat = self._path.stat()
            if self._seen == (stat.st_mtime_ns, stat.st_size) or stat.st_size > _LIMIT:
                return
            found = msgspec.json.decode(self._path.read_bytes(), type=_Deployment)
        except (OSError, msgspec.MsgspecError) as exc:
            if not self._told:
                _log.warning("%s: restarts are not known (%s)", self._path, exc)
            self._told = True
            return
        self._seen, self._told = (stat.st_mtime_ns, stat.st_size), False
        self.deployment = found.name
        self.processes = {process.name: process for process in found.processes}
