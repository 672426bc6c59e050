"""The journal alone: what was noted is read back, whatever was torn off its end, and never more."""

import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from pdserve.errors import StartError
from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer import append_file, journal
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.eviction import LeafFirstLru
from pdserve.transfer.journal import Journal
from pdserve.transfer.store import Store
from pdserve.transfer.wire import GRANTED, CommitItem, ReserveItem

SIZE = 16 * PAGE


def key(i):
    return i.to_bytes(32, "little")


class World:
    def __init__(self, path):
        self.path = path
        self.journal = Journal(path)
        self.left = self.journal.read(SIZE)
        self.journal.begin(SIZE, self.left)
        self.store = Store(SIZE, LeafFirstLru(), build(CACHE, CollectorRegistry()))
        self.store.on_committed.append(self.journal.committed)
        self.store.on_forgotten.append(self.journal.forgotten)

    def put(self, i, digest=None):
        (g,) = self.store.reserve([ReserveItem(key(i), b"", 0, 1, PAGE, 256, b"t")], "w", 1, 0.0)
        if g.status == GRANTED:
            self.store.commit([CommitItem(g.reservation, digest or i)], 1)
        self.journal.flush()

    def visible(self):
        return {c.key: (c.offset, c.digests) for c in self.store.chunks()}

    def killed(self):
        self.journal._file.close()
        if self.journal._fresh:
            self.journal._fresh[0].close()

    def read(self):
        """What would be read if it were killed now."""
        copy = self.path.with_suffix(".copy")
        shutil.copy(self.path, copy)
        return read(copy)


def read(path, size=SIZE):
    j = Journal(path)
    left = j.read(size)
    j.close(keep=True)
    return {r.key: (offset, r.digests) for r, offset in left}


def test_what_was_visible_is_read_back_with_all_that_a_record_holds(tmp_path):
    w = World(tmp_path / "j.journal")
    for i in range(1, 30):  # more than fits: the first are evicted
        w.put(i)
    w.store.drop([key(20)], "corrupt")
    w.journal.flush()
    w.killed()
    again = World(w.path)
    assert {r.key: (o, r.digests) for r, o in again.left} == w.visible()
    record, _ = again.left[0]
    assert (record.tokens, record.shard_bytes, record.tag) == (256, PAGE, b"t")
    again.killed()
    assert read(w.path) == w.visible()  # a second crash before anything was verified loses nothing


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 4000), junk=st.binary(max_size=40))
def test_a_torn_end_costs_the_last_entries_only(tmp_path_factory, cut, junk):
    path = tmp_path_factory.mktemp("j") / "j.journal"
    w = World(path)
    states = [(0, {})]
    for i in range(1, 20):
        w.put(i)
        states.append((w.journal._file.length, w.visible()))
    size = max(60, w.journal._file.length - cut)
    w.killed()
    os.truncate(path, size)
    with path.open("ab") as f:
        f.write(junk)
    # An eviction and the commit that needed its space are one flush; in between, both may be cut at an entry.
    whole = [visible for at, visible in states if at <= size]
    got = read(path)
    for k, where in got.items():
        assert any(v.get(k) == where for v in (*whole, states[min(len(whole), len(states) - 1)][1]))
    assert set(whole[-1]) - set(got) <= {
        k for k in whole[-1] if len(whole) < len(states) and k not in states[len(whole)][1]
    }


def test_it_stays_short_however_much_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MIN_COMPACT", 2000)
    monkeypatch.setattr(append_file, "AHEAD", PAGE)
    w = World(tmp_path / "j.journal")
    largest = 0
    for i in range(1, 2000):
        w.put(i)
        largest = max(largest, os.path.getsize(w.path))
    assert largest < 20_000
    assert w.read() == w.visible()
    w.journal.close(keep=False)
    assert [p.name for p in tmp_path.iterdir()] == ["j.copy"]


def test_while_it_is_written_anew_nothing_is_lost_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MIN_COMPACT", 2000)
    monkeypatch.setattr(journal, "A_FLUSH", 1)
    monkeypatch.setattr(journal, "FOR_EACH", 1)
    w = World(tmp_path / "j.journal")
    fresh, under_way = tmp_path / "j.journal.new", 0
    files = [w.path.stat().st_ino]  # whenever it is another one: both are there for a moment, so the number is another
    for i in range(1, 300):
        if i % 7 == 0:
            w.store.drop([key(i - 3)], "corrupt")
        w.put(i % 40)  # some come again while they are copied
        if (number := w.path.stat().st_ino) != files[-1]:
            files.append(number)
        under_way += fresh.exists()
        assert w.read() == w.visible()
    assert under_way > 10
    assert len(files) > 3
    while not fresh.exists():
        i += 1
        w.put(i)
    w.killed()
    again = World(w.path)  # what was half written is nothing to it
    assert {r.key: (o, r.digests) for r, o in again.left} == w.visible()
    assert not fresh.exists()
    again.journal.close(keep=False)


@pytest.mark.parametrize("change", ["size", "format", "head", "empty"])
def test_another_arena_or_format_is_not_read(tmp_path, change, monkeypatch):
    w = World(tmp_path / "j.journal")
    w.put(1)
    w.killed()
    if change == "format":
        monkeypatch.setattr(journal, "FORMAT", 99)
    if change == "head":
        data = bytearray(w.path.read_bytes())
        data[10] ^= 1
        w.path.write_bytes(data)
    if change == "empty":
        w.path.write_bytes(b"")
    assert read(w.path, SIZE + PAGE if change == "size" else SIZE) == {}


@pytest.mark.parametrize("anew", [False, True])
def test_a_journal_that_cannot_be_written_is_emptied_and_serving_goes_on(tmp_path, monkeypatch, caplog, anew):
    monkeypatch.setattr(append_file, "AHEAD", 256)
    if anew:
        monkeypatch.setattr(journal, "MIN_COMPACT", 0)
        monkeypatch.setattr(journal, "SLACK", 0)
    w = World(tmp_path / "j.journal")
    w.put(1)

    def full(fd, at, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(append_file.os, "posix_fallocate", full)
    for i in range(2, 9):
        w.put(i)
    monkeypatch.undo()
    w.put(9)
    assert len(w.visible()) == 9
    assert "chunks in memory will not survive a crash" in caplog.text
    assert w.read() == {}
    w.journal.close(keep=False)
    assert [p.name for p in tmp_path.iterdir()] == ["j.copy"]


def test_two_daemons_of_one_name_are_refused(tmp_path):
    w = World(tmp_path / "j.journal")
    with pytest.raises(StartError, match="another cache daemon of this name"):
        Journal(w.path)
    w.put(1)
    w.journal.close(keep=False)
    assert not w.path.exists()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_at_all_are_read_without_harm(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.journal"
    path.write_bytes(data)
    read(path)
