"""Mappings at aligned addresses: given back once, with the last array over them, whoever closes what."""

from __future__ import annotations

import errno
import gc
import os

import numpy as np
import pytest

from pdserve.transfer import mapping
from pdserve.transfer.mapping import Mapping

MIB = 1 << 20
SMAPS = """\
7f0000000000-7f0000400000 rw-s 00000000 00:1b 7 /dev/shm/pdserve-x.arena
Size:               4096 kB
ShmemPmdMapped:     2048 kB
7f0000400000-7f0000600000 rw-s 00400000 00:1b 7 /dev/shm/pdserve-x.arena
ShmemPmdMapped:     2048 kB
7f0000600000-7f0000800000 rw-s 00000000 00:1b 8 /dev/shm/another
ShmemPmdMapped:     2048 kB
"""


class Kernel:
    """Counts what is mapped and given back."""

    def __init__(self, monkeypatch) -> None:
        self.taken: list[tuple[int, int]] = []
        self.given: list[tuple[int, int]] = []
        take, give = mapping._map, mapping._unmap

        def counted(address, size, protection, flags, fd):
            got = take(address, size, protection, flags, fd)
            if address is None:
                self.taken.append((got, size))
            return got

        monkeypatch.setattr(mapping, "_map", counted)
        monkeypatch.setattr(
            mapping, "_unmap", lambda address, size: (self.given.append((address, size)), give(address, size))
        )

    def is_even(self) -> bool:
        """What was given back is what was taken, each byte once."""
        return pages(self.taken) == pages(self.given)


def pages(parts: list[tuple[int, int]]) -> list[int]:
    return sorted(page for start, size in parts for page in range(start, start + size, 4096))


@pytest.fixture
def fd():
    fd = os.memfd_create("test")
    os.ftruncate(fd, 8 * MIB)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("size", [1, 4096, 2 * MIB, 3 * MIB + 5])
@pytest.mark.parametrize("unit", [0, 2 * MIB, 8 * MIB])
def test_the_address_is_a_whole_number_of_huge_pages(fd, monkeypatch, size, unit):
    kernel = Kernel(monkeypatch)
    monkeypatch.setattr(mapping, "huge_page", lambda: unit)
    made = Mapping(fd, size)
    assert made.address % (unit or 4096) == 0
    data = made.bytes()
    assert (data.nbytes, data.dtype, data.ctypes.data) == (size, np.uint8, made.address)
    data[:] = 9
    assert os.pread(fd, size + 1, 0) == b"\x09" * size + b"\0"
    assert not kernel.is_even()
    del made, data
    assert kernel.is_even()


def test_it_goes_once_and_with_the_last_that_uses_it(fd, monkeypatch):
    kernel = Kernel(monkeypatch)
    made = Mapping(fd, 4096)
    whole = (made.address, 4096)
    part, words, view = made.bytes()[5:9], made.bytes().view(np.uint64), memoryview(made.bytes())[1:3]
    del made, part, words
    gc.collect()
    assert whole not in kernel.given
    view[0] = 5
    del view
    assert kernel.given.count(whole) == 1
    gc.collect()
    assert kernel.given.count(whole) == 1
    assert kernel.is_even()


def test_what_cannot_be_mapped_gives_its_room_back(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch)
    (tmp_path / "file").write_bytes(b"x")
    fd = os.open(tmp_path / "file", os.O_RDONLY)  # and is to be written
    try:
        with pytest.raises(PermissionError, match="cannot map 4096 bytes"):
            Mapping(fd, 4096)
        with pytest.raises(OSError, match="cannot map 0 bytes"):
            Mapping(fd, 0)
    finally:
        os.close(fd)
    assert kernel.taken
    assert kernel.is_even()


def test_page_tables_are_filled_in_place(fd):
    made = Mapping(fd, 2 * MIB, populate=False)
    at, data = made.address, made.bytes()
    data[7] = 7
    made.populate(fd)
    assert (made.address, data[7]) == (at, 7)


def test_a_hole_has_nothing_to_collapse(fd):
    if not mapping.huge_page():
        pytest.skip("this kernel has no huge pages")
    assert Mapping(fd, 4 * MIB, populate=False).collapse(0, 4 * MIB) == errno.EINVAL


def test_huge_pages_of_this_memory_and_no_other(monkeypatch, tmp_path):
    (tmp_path / "smaps").write_text(SMAPS)
    monkeypatch.setattr(mapping, "_SMAPS", tmp_path / "smaps")
    assert mapping.huge_bytes(0x7F0000000000, 6 * MIB) == 4 * MIB
    assert mapping.huge_bytes(0x7F0000600000, 2 * MIB) == 2 * MIB
    assert mapping.huge_bytes(0x7F0000800000, 2 * MIB) == 0
    monkeypatch.setattr(mapping, "_SMAPS", tmp_path / "none")
    assert mapping.huge_bytes(0x7F0000000000, 6 * MIB) == 0


@pytest.mark.parametrize(("says", "size"), [("2097152\n", 2 * MIB), ("", 0), (None, 0)])
def test_the_size_of_a_huge_page(monkeypatch, tmp_path, says, size):
    if says is not None:
        (tmp_path / "size").write_text(says)
    monkeypatch.setattr(mapping, "_SIZE", tmp_path / "size")
    assert mapping.huge_page() == size
