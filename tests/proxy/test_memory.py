"""What a request leaves behind, counted in blocks and bytes rather than in resident memory, which says nothing of so few.

What failing requests leave is in test_garbage.py."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import sys
from typing import Any

import pytest

from pdserve.proxy.upstream import Upstream

pytestmark = pytest.mark.anyio
AT_ONCE, WARM, COUNTED, ROUNDS = 8, 100, 250, 4
BLOCKS, BYTES = COUNTED // 4, COUNTED * 16  # what a round may leave: less than an object for every fourth request, 16 bytes each


class _Told(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


_LIBC = ctypes.CDLL(None)
HAS = hasattr(_LIBC, "mallinfo2")
if HAS:
    _LIBC.mallinfo2.restype = _Told


def native() -> int:
    """Bytes that malloc has given out: what is above 512 bytes in Python, and all that C libraries hold."""
    told = _LIBC.mallinfo2()
    return int(told.uordblks + told.hblkhd)


async def ask(proxy: Upstream, kind: str) -> None:
    body = {"model": "fake", "prompt": "one two three", "stream": kind != "whole", "max_tokens": 4}
    headers = [(b"content-type", b"application/json"), (b"x-session-id", b"s")]
    async with proxy.request(b"POST", b"/v1/completions", headers, json.dumps(body).encode(), 30) as answer:
        while await answer.chunk(60):
            if kind == "leaves":
                return


@pytest.mark.skipif(not HAS, reason="the C library has no mallinfo2 (glibc 2.33 has)")
@pytest.mark.parametrize("kind", ["whole", "streamed", "early", "leaves"])
async def test_requests_leave_no_memory_behind(rig: Any, kind: str, uncollected: None, unlogged: None) -> None:
    """What each request leaves is in every round; what is grown once, or by the clock (the dashboard's samples), is not."""
    early = {"early_decode": True, "early_token": True} if kind == "early" else {}
    async with rig(probe_every=30, engine={"keep": 0}, **early) as r:
        r.app.state.history._capacity = 50
        proxy = Upstream("proxy", r.url)

        async def run(count: int) -> None:
            left = iter(range(count))

            async def client() -> None:
                for _ in left:
                    await ask(proxy, kind)

            await asyncio.gather(*(client() for _ in range(AT_ONCE)))
            await r.settled()

        await run(WARM)
        blocks, held = [sys.getallocatedblocks()], [native()]
        for _ in range(ROUNDS):
            await run(COUNTED)
            blocks.append(sys.getallocatedblocks())
            held.append(native())
        await proxy.close()
    assert min(b - a for a, b in itertools.pairwise(blocks)) < BLOCKS, blocks
    assert min(b - a for a, b in itertools.pairwise(held)) < BYTES, held
