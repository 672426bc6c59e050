"""Workers over a real daemon, with plain arrays for the engine's blocks. Imports vLLM."""

import threading
import time

import numpy as np

from pdserve.engines.vllm.messages import ChunkExpected, ChunkLoad, ChunkSave, LoadJob, SaveJob, StepPlan
from pdserve.engines.vllm.worker_side import WorkerSide
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging_host import HostPages

LAYERS, BLOCKS, BLOCK_BYTES = 3, 16, 4096


class Engine:
    """A worker with `LAYERS` tensors of blocks, filled at random."""

    def __init__(self, socket, rank=0, shards=1, writer="w", kind=HostPages, quick=None):
        self.kv = np.random.default_rng().integers(0, 256, (LAYERS, BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self.side = WorkerSide(CacheClient(socket, f"worker-{rank}"), shards=shards, writer=writer)
        self.pages = kind(
            [[self.kv[i].ctypes.data for i in range(LAYERS)]],
            [BLOCK_BYTES] * LAYERS,
            BLOCK_BYTES,
            BLOCKS,
            first_shard=rank,
        )
        self.side.register([self.pages], quick)

    def save(self, rid, *chunks):
        self.side.start_saves(StepPlan(saves=[SaveJob(rid, [ChunkSave(k, p, 256, b) for k, p, b in chunks])]))

    def wait(self, what, seconds=60):
        deadline = time.monotonic() + seconds
        while not (got := what()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return got


class Held(HostPages):
    """Loads under way end when the test says so, as a device's do later than they are submitted."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.may_end, self.under_way = threading.Event(), 0

    def load(self, *args):
        self.under_way += 1
        return HeldCopy(super().load(*args), self.may_end)


class HeldCopy:
    def __init__(self, copy, may_end):
        self.copy, self.may_end = copy, may_end

    def done(self):
        return self.may_end.is_set()

    def digests(self):
        assert self.may_end.wait(60)
        return self.copy.digests()


def key(i):
    return i.to_bytes(32, "little")


def job(client, rid, keys, blocks):
    reply = client.lookup(keys, 60)
    assert len(reply.found) == len(keys)
    chunks = [
        ChunkLoad(k, f.offset, f.tokens, f.shard_bytes, f.stride, f.digests, b)
        for k, f, b in zip(keys, reply.found, blocks, strict=True)
    ]
    return LoadJob(rid, client.daemon_id, chunks), reply.lease


def expecting(client, rid, keys, blocks, stall_s):
    expected = [ChunkExpected(k, 256, b) for k, b in zip(keys, blocks, strict=True)]
    return LoadJob(rid, client.daemon_id, [], expected, stall_s)
