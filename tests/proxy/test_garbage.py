from __future__ import annotations

import gc
from typing import Any

import pytest

from pdserve.proxy.relay import Client
from pdserve.proxy.split import Exchange

pytestmark = pytest.mark.anyio


async def test_a_request_leaves_nothing_for_the_collector(rig: Any) -> None:
    """What is in no circle goes at once; with circles each request, its body included, would stay until a collection."""
    async with rig() as r:
        gc.collect()
        gc.disable()
        try:
            for stream in (True, False) * 5:
                assert (await r.complete(stream=stream, max_tokens=3)).status == 200
            await r.settled()
            left = [found for found in gc.get_objects() if isinstance(found, Client | Exchange)]
            assert left == []
        finally:
            gc.enable()
