"""A thread that copies beside the engine, and how it begins and ends; what it does with its jobs is in saving.py and loading.py."""

from __future__ import annotations

import queue
import threading
from typing import Any

from pdserve import log
from pdserve.engines.vllm.cores import any_core
from pdserve.engines.vllm.parts import Parts
from pdserve.errors import CacheError
from pdserve.transfer.client import CacheClient

RPC_S = 5.0


class Copier:
    """Jobs go into `_jobs`; None is the end."""

    def __init__(self, client: CacheClient, name: str) -> None:
        self._client = client
        self._pages: Parts | None = None
        self._log = log.get("connector")
        self._jobs: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._begin, name=name, daemon=True)

    def start(self, pages: Parts) -> None:
        self._pages = pages
        self._thread.start()

    def stop(self) -> bool:
        """Ends the thread; False when it does not end in time."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=RPC_S)
        return not self._thread.is_alive()

    def _begin(self) -> None:
        any_core()
        try:
            self._client.connect()  # now rather than in the first request: mapping the arena takes a while
        except CacheError as e:
            self._log.debug("%s", e)
        self._run()

    def _run(self) -> None:
        """Until None comes out of `_jobs`."""
        raise NotImplementedError
