"""How much of the bus a load takes, by what goes on beside it. What is loaded is asked in test_worker_side and test_late_chunks."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="the connector's messages derive from vLLM's classes")
from pdserve.engines.vllm.giving_way import SEVERAL, TOGETHER, GivingWay
from pdserve.engines.vllm.loading import Loader
from pdserve.engines.vllm.messages import ChunkLoad, LoadJob
from pdserve.engines.vllm.parts import Parts
from pdserve.transfer.staging import Done

CHUNKS, SHARD = 9, 64


class Device:
    """Pages that say what was asked of them; `may_go` holds the first call up."""

    on_device, stores, together, shard_count = True, True, 4, 1

    def __init__(self, first_shard: int = 0) -> None:
        self.first_shard = first_shard
        self.asked: list[tuple[int, int]] = []
        self.begun, self.may_go = threading.Event(), threading.Event()
        self.may_go.set()

    def attach(self, arena, chunk_tokens):
        """Nothing to prepare."""

    def shard_bytes(self, tokens, blocks):
        return SHARD

    def load_all(self, mark, parts, share):
        self.asked.append((len(parts), share))
        self.begun.set()
        assert self.may_go.wait(10)
        return [Done([7]) for _ in parts]


class World:
    def __init__(self, way: GivingWay, *devices: Device) -> None:
        arena = SimpleNamespace(bytes=np.zeros(CHUNKS * SHARD * len(devices), np.uint8))
        client = SimpleNamespace(connect=lambda: None, connected=True, arena=arena, daemon_id="d", chunk_tokens=256)
        self.ended: list[tuple[str, int]] = []
        self._all = threading.Semaphore(0)
        self._shards = len(devices)
        self.loader = Loader(client, self._done, way=way)
        self.loader.start(Parts(devices))

    def _done(self, job, result, unfilled):
        self.ended.append((job.request_id, result.chunks))
        self._all.release()

    def put(self, name: str) -> None:
        digests = [7] * self._shards
        chunks = [ChunkLoad(bytes([n]) * 32, n * SHARD * self._shards, 256, SHARD, SHARD, digests, [n]) for n in range(CHUNKS)]
        self.loader.put(LoadJob(name, "d", chunks), None)

    def end(self, loads: int = 1) -> list[tuple[str, int]]:
        for _ in range(loads):  # before stop(), which is a job that waits, too
            assert self._all.acquire(timeout=10)
        assert self.loader.stop()
        return self.ended


def test_beside_few_answers_all_of_the_bus():
    way, device = GivingWay(0.5), Device()
    way.answers = SEVERAL - 1
    world = World(way, device)
    world.put("a")
    assert world.end() == [("a", CHUNKS)]
    assert device.asked == [(1, 100), (4, 100), (4, 100)]


def test_beside_several_a_share():
    way, device = GivingWay(0.5), Device()
    way.answers = SEVERAL
    world = World(way, device)
    world.put("a")
    assert world.end() == [("a", CHUNKS)]
    assert device.asked == [(1, 50), *[(TOGETHER, 50)] * 4]


def test_all_of_it_while_another_load_waits():
    way, device = GivingWay(0.5), Device()
    way.answers = SEVERAL
    device.may_go.clear()
    world = World(way, device)
    world.put("a")
    assert device.begun.wait(10)
    world.put("b")
    device.may_go.set()
    assert world.end(2) == [("a", CHUNKS), ("b", CHUNKS)]
    assert device.asked[:3] == [(1, 50), (4, 100), (4, 100)]
    assert set(device.asked[3:]) == {(1, 50), (TOGETHER, 50)}, "nobody waits behind the second"


def test_layer_groups_have_one_share_together():
    way, devices = GivingWay(0.6), [Device(0), Device(1)]
    way.answers = SEVERAL
    world = World(way, *devices)
    world.put("a")
    assert world.end() == [("a", CHUNKS)]
    assert {share for device in devices for _, share in device.asked} == {30}
