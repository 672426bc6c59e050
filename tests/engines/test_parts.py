"""Several pages of one worker: asked as one where the engine's work is concerned, and the arena pinned once for all."""

import types

import numpy as np
import pytest

from pdserve.engines.vllm.parts import Parts
from pdserve.transfer.staging import Pinned


class Recorded:
    """A part, or a device, that keeps what it was asked."""

    def __init__(self, **has):
        self.asked = []
        self.__dict__.update(has)

    def __getattr__(self, name):
        def call(*args):
            self.asked.append((name, *args))
            return name

        return call


def part(first_shard=0):
    return Recorded(on_device=True, stores=True, together=8, first_shard=first_shard)


def test_all_parts_hear_what_concerns_the_engine_and_one_marks_its_work():
    parts = [part(4), part(8)]
    pages = Parts(parts)
    pages.attach("arena", 256)
    assert pages.mark() == "mark"
    pages.settle()
    pages.close()
    heard = [("attach", "arena", 256), ("settle",), ("close",)]
    assert [c for c in parts[0].asked if c != ("mark",)] == parts[1].asked == heard
    assert parts[0].asked.count(("mark",)) == 1
    assert pages.describe() == "describe; 2 layer groups like this"
    assert (pages.on_device, pages.stores, pages.together, pages.tells) == (True, True, 8, False)
    assert [pages.share(p) for p in (100, 60, 1)] == [100, 30, 1], "each has its part of what all may take"
    assert Parts([part()]).tells
    assert Parts([part()]).describe() == "describe"
    with pytest.raises(ValueError, match="without KV"):
        Parts([])


def arena(size=64):
    return types.SimpleNamespace(bytes=np.zeros(size, np.uint8), size=size)


def test_an_arena_is_pinned_once_and_until_its_last_user_has_left_it():
    pinned, device, old, new = Pinned(), Recorded(), arena(), arena(128)
    address = [a.bytes.ctypes.data for a in (old, new)]
    for _ in range(2):
        pinned.pin(device, old)
    assert device.asked == [("register", address[0], 64)]
    pinned.unpin(device, old)  # the daemon came back with another arena: one part after the other moves on
    pinned.pin(device, new)
    assert device.asked[1:] == [("register", address[1], 128)]
    pinned.unpin(device, old)
    pinned.pin(device, new)
    assert device.asked[2:] == [("unregister", address[0])]
    for _ in range(2):
        pinned.unpin(device, new)
    assert device.asked[3:] == [("unregister", address[1])]


def test_a_device_that_refuses_an_arena_is_asked_again():
    class Refuses:
        def __init__(self):
            self.left = 1
            self.asked = 0

        def register(self, address, size):
            self.asked += 1
            if self.left:
                self.left -= 1
                raise RuntimeError("no")

    pinned, device, one = Pinned(), Refuses(), arena()
    with pytest.raises(RuntimeError):
        pinned.pin(device, one)
    pinned.pin(device, one)
    assert device.asked == 2
