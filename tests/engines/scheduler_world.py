"""The scheduler's half over the real index (store.py), without sockets or an engine. Imports vLLM."""

import types

from prometheus_client import CollectorRegistry
from scheduler_output import step

from pdserve.chunk import ChunkLayout
from pdserve.engines.vllm.scheduler_side import SchedulerSide
from pdserve.errors import CacheUnavailable
from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer import wire
from pdserve.transfer.eviction import LeafFirstLru
from pdserve.transfer.store import Store

BLOCK, CHUNK = 4, 8
LAYOUT = ChunkLayout(kind="opaque-block", kv_dtype="float32", layers=2, block_tokens=BLOCK, block_bytes=512, shards=1)
PROMISE = {"do_remote_prefill": True, "pdserve.num_tokens": 19}


class DirectClient:
    """CacheClient's calls, straight into a Store."""

    def __init__(self, store: Store, chunk_tokens: int = CHUNK) -> None:
        self.store, self.chunk_tokens, self.connected, self.daemon_id = store, chunk_tokens, True, "d1"
        self.released, self.pushed = [], []

    def push(self, target, keys, timeout):
        self.pushed.append((target, len(keys)))
        return len(keys)

    @property
    def content(self):
        return (self.daemon_id, self.store.dropped)

    def connect(self, timeout=0):
        if not self.connected:
            raise CacheUnavailable("none")

    def lookup(self, keys, timeout, prefill_speed=0.0):
        self.connect()
        return wire.LookupReply(1, *self.store.lookup(keys, 1, 0.0))

    def release_soon(self, lease, loaded_chunks=0, loaded_bytes=0, corrupt=None):
        self.released.append((loaded_chunks, corrupt or []))
        self.store.drop(corrupt or [], "corrupt")
        self.store.release(lease, 1)

    def close(self):
        pass


class Status:
    def __init__(self, name):
        self.name = name


def request(rid, tokens, **extra):
    tokens = list(tokens)
    fields = {
        "request_id": rid,
        "prompt_token_ids": tokens,
        "all_token_ids": list(tokens),
        "num_prompt_tokens": len(tokens),
        "num_tokens": len(tokens),
        "kv_transfer_params": None,
        "lora_request": None,
        "cache_salt": None,
        "mm_features": [],
        "status": Status("FINISHED_LENGTH_CAPPED"),
    }
    return types.SimpleNamespace(**{**fields, **extra})


def output(report=None, received=()):
    return types.SimpleNamespace(kv_connector_worker_meta=report, finished_recving=set(received))


def commit(store, saves):
    """What a worker does with a save job, less the bytes."""
    for job in saves:
        items = [wire.ReserveItem(c.key, c.parent, 0, 1, LAYOUT.shard_bytes(c.tokens), c.tokens) for c in job.chunks]
        grants = store.reserve(items, "w", 2, 0.0)
        store.commit([wire.CommitItem(g.reservation, 7) for g in grants if g.status == wire.GRANTED], 2)


def compute_all(world, rid, tokens, **extra):
    """Runs a prompt through in one step and stores what the plan says."""
    r = request(rid, tokens, **extra)
    assert world.side.matched(r, 0) == (0, False)
    world.side.allocated(r, list(range(-(-len(tokens) // BLOCK))), 0)
    plan = world.side.plan(step({rid: len(tokens)}, new=[(rid, 0)]))
    commit(world.store, plan.saves)
    return r, plan


def make() -> types.SimpleNamespace:
    store = Store(1 << 22, LeafFirstLru(), build(CACHE, CollectorRegistry()))
    client = DirectClient(store)
    return types.SimpleNamespace(
        store=store, client=client, side=SchedulerSide(client, LAYOUT, "model", workers=1, instance="prefill-0")
    )
