"""The disk tier on a disk that refuses, fails or takes its time."""

import errno
import os
import threading

import numpy as np
import pytest
from disk_chunks import SEGMENT, chunk, fail, fill, open_tier, present, soon, whole

from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.base import TierError


@pytest.mark.parametrize(
    ("number", "state"),
    [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EIO, "failing: Input/output error")],
)
def test_writes_that_fail_leave_reads_alone_and_are_tried_again_later(tmp_path, monkeypatch, number, state):
    tier = open_tier(tmp_path)
    fill(tier, range(4))
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: real(fd, [views[0]], at) and fail(number))
    record, payload = chunk(9)
    with pytest.raises(TierError):
        tier.put(record, payload, soon())
    assert tier.stats()["state"] == state
    assert tier.put(record, payload, soon()) is False  # not asked again for a while
    assert present(tier, range(10)) == [0, 1, 2, 3]
    files = len(list(tmp_path.glob("*.seg")))
    for _ in range(5):
        tier._retry_at = 0.0
        with pytest.raises(TierError):
            tier.put(record, payload, soon())
    assert len(list(tmp_path.glob("*.seg"))) <= files + 1  # no trail of empty files
    monkeypatch.undo()
    tier._retry_at = 0.0
    fill(tier, [9])
    assert tier.stats()["state"] == "ok"
    assert present(tier, range(10)) == [0, 1, 2, 3, 9]
    tier.close()
    again = open_tier(tmp_path)
    assert present(again, range(10)) == [0, 1, 2, 3, 9]
    again.close()


def test_a_region_that_cannot_be_read_is_quarantined(tmp_path, monkeypatch):
    tier = open_tier(tmp_path)
    fill(tier, range(3))
    monkeypatch.setattr(os, "preadv", lambda *a: fail(errno.EIO))
    record, _ = chunk(1)
    with pytest.raises(TierError, match="reading"):
        tier.get(record, [segments.aligned(record.shard_bytes) for _ in record.digests], soon())
    monkeypatch.undo()
    assert present(tier, range(3)) == [0, 2]
    assert tier.stats()["quarantined_chunks"] == 1
    tier.close()
    again = open_tier(tmp_path)
    assert present(again, range(3)) == [0, 2]
    again.close()


def test_where_the_file_system_refuses_direct_io_the_page_cache_serves(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            fail(errno.EINVAL)
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    tier = open_tier(tmp_path)
    fill(tier, range(4))
    assert tier.stats()["direct"] == 0
    assert present(tier, range(4)) == [0, 1, 2, 3]
    tier.close()


def test_readers_of_a_segment_that_is_thrown_away_end_in_peace(tmp_path, monkeypatch):
    tier = open_tier(tmp_path)
    fill(tier, range(3))
    real = segments.read_record

    def slow(fd, place, shards, deadline):
        tier.clear()
        fill(tier, range(100, 110))  # takes new files: were the old one closed, its number would mean one of these
        return real(fd, place, shards, deadline)

    monkeypatch.setattr(segments, "read_record", slow)
    record, payload = chunk(1)
    into = [segments.aligned(record.shard_bytes) for _ in record.digests]
    assert tier.get(record, into, soon()) in (True, False)
    assert all(np.array_equal(a, b) for a, b in zip(into, payload, strict=True))
    monkeypatch.undo()
    assert present(tier, range(3)) == []
    tier.close()


def test_files_are_removed_without_the_lock_for_which_the_loop_waits(tmp_path, monkeypatch):
    """Freeing a segment's blocks takes a disk many milliseconds."""
    tier = open_tier(tmp_path, size=4 * SEGMENT)
    tier._shelf.lock = threading.RLock()  # it knows whether this thread holds it; the index is saved by another
    free: list[tuple[str, bool]] = []

    def noting(what, call):
        def instead(*args, **named):
            free.append((what, not tier._shelf.lock._is_owned()))
            return call(*args, **named)

        return instead

    monkeypatch.setattr(type(tier.path), "unlink", noting("unlink", type(tier.path).unlink))
    monkeypatch.setattr(os, "close", noting("close", os.close))
    fill(tier, range(60))  # several times what fits
    assert tier.stats()["evicted_chunks"]
    tier.clear()
    monkeypatch.undo()
    assert {"unlink", "close"} <= {what for what, _ in free}
    assert all(was for _, was in free)
    assert not list(tmp_path.glob("*.seg"))
    fill(tier, range(5))
    assert all(whole(tier, i) for i in range(5))
    tier.close()


def test_a_file_that_cannot_be_removed_costs_nothing_that_is_in_it(tmp_path, monkeypatch):
    tier = open_tier(tmp_path, size=4 * SEGMENT)
    fill(tier, range(8))
    before = [i for i in range(8) if whole(tier, i)]

    def refuse(*_, **__):
        fail(errno.EROFS)

    monkeypatch.setattr(type(tier.path), "unlink", refuse)
    with pytest.raises(OSError, match="Read-only"):
        tier.clear()
    monkeypatch.undo()
    assert [i for i in range(8) if whole(tier, i)] == before
    assert tier.clear() == len(before)
    tier.close()
