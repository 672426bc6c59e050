"""The arena's making: what does not fit is refused before a page is taken, what is broken off leaves nothing, and every page is
there for real, huge or small."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

import pytest

from pdserve.errors import CacheUnavailable, StartError
from pdserve.transfer import arena, mapping
from pdserve.transfer.mapping import Mapping

MIB = 1 << 20


@pytest.fixture
def path():
    path = arena.path_for(f"test-{os.getpid()}-arena")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def unit(monkeypatch):
    """Huge pages of 2 MiB and steps of two of them, whatever this machine has."""
    monkeypatch.setattr(arena, "huge_page", lambda: 2 * MIB)
    monkeypatch.setattr(mapping, "huge_page", lambda: 2 * MIB)
    monkeypatch.setattr(arena, "_STEP", 4 * MIB)
    return 2 * MIB


class Kernel:
    """Answers to whoever asks for huge pages, and gives none."""

    def __init__(self, monkeypatch, *answers: int) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[int, int]] = []
        monkeypatch.setattr(Mapping, "collapse", lambda _, start, length: self.answer(start, length))

    def answer(self, start: int, length: int) -> int:
        self.asked.append((start, length))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def mapped(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def is_all_there(path: Path, size: int) -> bool:
    return path.stat().st_size == size and path.stat().st_blocks * 512 >= size


@pytest.mark.parametrize("short", ["_free_memory", "free_shared_memory"])
def test_more_than_there_is_is_refused_before_a_page_is_taken(path, monkeypatch, short):
    monkeypatch.setattr(arena, short, lambda: 1 << 20)
    touched = []
    with pytest.raises(StartError, match=r"cannot take 0\.00 GiB.*are free.*Lower cache\.size \(--size\)"):
        arena.create(path, 2 << 20, touched.append)
    assert not touched
    assert not path.exists()


def test_more_than_the_control_group_may_take_is_refused(path, monkeypatch):
    monkeypatch.setattr(arena.memory_group, "left", lambda: 3 * MIB)
    with pytest.raises(StartError, match=r"0\.00 GiB of the memory that the machine and our control group"):
        arena.create(path, 4 * MIB)
    arena.create(path, 2 * MIB).close()


@pytest.mark.parametrize("why", [SystemExit, KeyboardInterrupt, OSError])
def test_making_it_that_is_broken_off_leaves_nothing(path, why):
    def end(done):
        raise why

    with pytest.raises(StartError if why is OSError else why):
        arena.create(path, 1 << 20, end)
    assert not path.exists()
    assert not mapped(path)


def test_memory_that_runs_out_halfway_leaves_nothing(path, monkeypatch, unit):
    Kernel(monkeypatch, errno.ENOMEM)
    real, seen = os.posix_fallocate, []

    def fallocate(fd, start, length):
        if start >= 6 * MIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seen.append(start)
        real(fd, start, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(StartError, match=r"No space left.*Lower cache\.size"):
        arena.create(path, 16 * MIB)
    assert seen
    assert not path.exists()
    assert not mapped(path)


def test_what_an_earlier_process_left_makes_room_first(path):
    arena.create(path, 1 << 20).close()
    made = arena.create(path, 2 << 20)
    assert made.size == path.stat().st_size == 2 << 20
    made.close()


@pytest.mark.parametrize("size", [4096, 2 * MIB, 5 * MIB + 123, 13 * MIB])
@pytest.mark.parametrize("answer", [0, errno.EINVAL, errno.ENOMEM, errno.EBUSY, errno.EAGAIN])
def test_every_page_is_there_whatever_the_kernel_says_of_huge_ones(path, monkeypatch, unit, size, answer):
    Kernel(monkeypatch, answer)  # also one that says yes and gives none
    told: list[int] = []
    made = arena.create(path, size, told.append)
    assert is_all_there(path, size)
    assert not made.bytes.any()
    assert made.huge_bytes() == 0
    assert told == [*range(4 * MIB, size, 4 * MIB), size]
    made.close()


def test_as_many_huge_pages_as_the_kernel_gave_are_counted(path, monkeypatch):
    codes = []
    real = Mapping.collapse
    monkeypatch.setattr(Mapping, "collapse", lambda *given: codes.append(real(*given)) or codes[-1])
    unit = mapping.huge_page() or pytest.skip("this kernel has no huge pages")
    made = arena.create(path, 2 * unit + 4096)
    assert is_all_there(path, made.size)
    if codes != [0]:
        pytest.skip(f"the kernel gave no huge pages: {os.strerror(codes[0])}")
    assert made.huge_bytes() == 2 * unit
    for again in (arena.attach(path, made.size), arena.reopen(path, made.size)):
        assert again.huge_bytes() == 2 * unit
        again.close()
    made.close()


def test_huge_pages_are_asked_for_in_whole_ones_that_have_a_page(path, monkeypatch, unit):
    lacking = []

    def collapse(self, start, length):
        there = path.stat().st_blocks * 512  # all before it, and a page of each
        lacking.append(max(0, start + length // unit * 4096 - there))
        return kernel.answer(start, length)

    kernel = Kernel(monkeypatch, 0)
    monkeypatch.setattr(Mapping, "collapse", collapse)
    arena.create(path, 11 * MIB).close()
    assert kernel.asked == [(0, 4 * MIB), (4 * MIB, 4 * MIB), (8 * MIB, 2 * MIB)]
    assert lacking == [0, 0, 0]


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ((errno.EINVAL,), 1),  # no such thing on this kernel
        ((errno.ENOMEM,), 4),  # four in a row: there will be none
        ((errno.ENOMEM, errno.EAGAIN, errno.ENOMEM, 0, errno.EBUSY), 8),  # one came meanwhile
        ((0,), 10),
    ],
)
def test_a_kernel_that_has_none_is_not_asked_for_ever(path, monkeypatch, unit, answers, asked):
    kernel = Kernel(monkeypatch, *answers)
    arena.create(path, 40 * MIB).close()
    assert len(kernel.asked) == asked
    assert is_all_there(path, 40 * MIB)


def test_a_kernel_without_huge_pages(path, monkeypatch):
    for module in (arena, mapping):
        monkeypatch.setattr(module, "huge_page", lambda: 0)
    kernel = Kernel(monkeypatch, errno.EINVAL)
    arena.create(path, 3 * MIB).close()
    assert not kernel.asked
    assert is_all_there(path, 3 * MIB)
    assert arena.huge_page_trial() == errno.ENOSYS


def test_whoever_maps_it_does_so_where_huge_pages_can_be_mapped(path, unit):
    made = arena.create(path, 3 * MIB)
    there = [made, *(arena.attach(path, 3 * MIB) for _ in range(3)), arena.reopen(path, 3 * MIB)]
    assert all(a.bytes.ctypes.data % unit == 0 for a in there)
    made.bytes[-1] = 7
    assert all(a.bytes[-1] == 7 for a in there)
    for a in there:
        a.close()
    assert not mapped(path)


def test_another_size_or_nothing_there_is_refused(path):
    assert arena.reopen(path, MIB) is None
    with pytest.raises(CacheUnavailable, match="cannot open the arena"):
        arena.attach(path, MIB)
    arena.create(path, MIB).close()
    assert arena.reopen(path, 2 * MIB) is None
    with pytest.raises(CacheUnavailable, match=f"has {MIB} bytes, the daemon said {2 * MIB}"):
        arena.attach(path, 2 * MIB)
    assert not mapped(path)


@pytest.mark.parametrize("answer", [0, errno.EINVAL, errno.ENOMEM])
def test_a_trial_believes_what_is_mapped_and_leaves_nothing(monkeypatch, unit, answer):
    Kernel(monkeypatch, answer)
    opened, closed, mappings = [], [], []
    real_open, real_close, real_init = os.open, os.close, Mapping.__init__
    monkeypatch.setattr(os, "open", lambda *given: opened.append(real_open(*given)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda fd: closed.append(fd) or real_close(fd))

    def init(self, *given, **named):
        real_init(self, *given, **named)
        mappings.append(weakref.ref(self))

    monkeypatch.setattr(Mapping, "__init__", init)
    assert arena.huge_page_trial() == (answer or errno.EAGAIN)
    assert closed == opened
    assert len(opened) == 1
    assert [left() for left in mappings] == [None]
