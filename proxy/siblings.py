"""The other workers' records: each worker answers questions about its own history on a unix socket beside the counts.

One question a connection: a line of JSON, answered by a line of JSON. A worker that does not answer in time, or has just
gone, is left out of the answer rather than waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

from pdserve import log
from pdserve.proxy.history import History, Record

WITHIN_S = 1.0
_LINE = 64 * 1024  # of a question
_ANSWER = 64 * 1024 * 1024
_log = log.get("proxy.workers")


class Siblings:
    """`folder` is what the workers share, None where there is only one process."""

    def __init__(self, history: History, folder: Path | None, row: int) -> None:
        self._history, self._folder = history, folder
        self._path = None if folder is None else folder / f"history-{row}.sock"
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._answer, self._path, limit=_LINE)

    async def stop(self) -> None:
        if self._server is not None and self._path is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def records(self, limit: int, state: str) -> list[Record]:
        """The newest of all workers."""
        found = self._history.records(limit, state)
        for answer in await self._ask({"limit": limit, "state": state}):
            found += answer
        return sorted(found, key=lambda record: float(record["received"]), reverse=True)[:limit]

    async def record(self, request_id: str) -> Record | None:
        found = [self._history.record(request_id), *await self._ask({"id": request_id})]
        return max((r for r in found if r), key=lambda record: float(record["received"]), default=None)

    async def _ask(self, question: dict[str, Any]) -> list[Any]:
        if self._folder is None:
            return []
        others = [path for path in self._folder.glob("history-*.sock") if path != self._path]
        answers = await asyncio.gather(*(self._ask_one(path, question) for path in others))
        return [answer for answer in answers if answer is not None]

    async def _ask_one(self, path: Path, question: dict[str, Any]) -> Any:
        writer = None
        try:
            async with asyncio.timeout(WITHIN_S):
                reader, writer = await asyncio.open_unix_connection(path, limit=_ANSWER)
                writer.write(json.dumps(question).encode() + b"\n")
                return json.loads(await reader.readline())
        except (OSError, ValueError) as exc:  # TimeoutError is an OSError
            _log.debug("%s did not answer: %r", path.name, exc)
            return None
        finally:
            if writer is not None:
                writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever asked has gone, or asked for nothing sensible
            async with asyncio.timeout(WITHIN_S):
                match json.loads(await reader.readline()):
                    case {"id": str(request_id)}:
                        told: Any = self._history.record(request_id)
                    case {"limit": int(limit), "state": str(state)}:
                        told = self._history.records(limit, state)
                    case _:
                        raise ValueError("not a question")
                writer.write(json.dumps(told).encode() + b"\n")
                await writer.drain()
        writer.close()
