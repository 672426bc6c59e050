"""The disk tier: the rules of every tier, then what is its own: restarts, torn tails, flipped bits, caps, disks that fail."""

import contextlib
import errno
import logging
import os
import queue
import threading
import time

import numpy as np
import pytest

from pdserve import kernels
from pdserve.chunk import FORMAT_VERSION
from pdserve.errors import StartError
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import conformance, disk_index, segments
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, TierError
from pdserve.transfer.tiers.disk import DiskTier
from pdserve.transfer.tiers.disk_room import Room

SEGMENT = 64 * PAGE


class DiskSubject(conformance.Subject):
    def __init__(self, folder):
        self.folder = folder
        self.last = None

    def open(self):
        return DiskTier(self.folder, 64 << 20, min_free=0)

    def break_put(self, tier, record, payload):
        whole, os.pwritev = (
            os.pwritev,
            lambda fd, views, at: whole(fd, [views[0], views[1][:PAGE]], at) and _fail(errno.EIO),
        )
        try:
            with pytest.raises(TierError):
                tier.put(record, payload, conformance.soon())
        finally:
            os.pwritev = whole
        tier._retry_at = 0.0

    def flip(self, record, position):
        shard, at = divmod(position, record.shard_bytes)
        for file in self.folder.glob("*.seg"):
            data = bytearray(file.read_bytes())
            number = int(file.stem)
            for offset in range(PAGE, len(data), PAGE):
                found = segments.read_header(data[offset : offset + PAGE], number, offset)
                if found and found[1] and found[0].record.key == record.key:
                    stride = -(-record.shard_bytes // PAGE) * PAGE
                    where = offset + found[0].header_bytes + shard * stride + at
                    with file.open("r+b") as f:
                        f.seek(where)
                        f.write(bytes([data[where] ^ 1]))


def _fail(number):
    raise OSError(number, os.strerror(number))


# One process owns the folder: rules that open the tier twice at once do not apply; their content is tested below.
RULES = [
    r
    for r in conformance.RULES
    if r.__name__ not in ("a_new_tier_finds_what_an_old_one_stored", "half_a_chunk_is_never_seen")
]


@pytest.mark.parametrize("rule", RULES, ids=conformance.name_of)
def test_rule(rule, tmp_path):
    rule(DiskSubject(tmp_path / "kv"))


# ---- helpers ----


def chunk(i, pages=3, shards=2):
    rng = np.random.default_rng(i)
    payload = []
    for _ in range(shards):
        part = segments.aligned(pages * PAGE)
        part[:] = rng.integers(0, 256, part.size, dtype=np.uint8)
        payload.append(part)
    return ChunkRecord(
        FORMAT_VERSION, i.to_bytes(32, "little"), b"", 256, pages * PAGE, [kernels.digest(p) for p in payload], b"t"
    ), payload


def open_tier(folder, size=16 * SEGMENT, **options):
    return DiskTier(folder, size, **{"min_free": 0, "segment_bytes": SEGMENT, **options})


def soon():
    return time.monotonic() + 30


def fill(tier, ids, **shape):
    for i in ids:
        record, payload = chunk(i, **shape)
        assert tier.put(record, payload, soon())


def whole(tier, i, **shape):
    """True: there and right. False: not there. Anything else is an error."""
    record, payload = chunk(i, **shape)
    (known,) = tier.contains([record.key])
    if known is None:
        return False
    assert known == record
    into = [segments.aligned(record.shard_bytes) for _ in record.digests]
    try:
        if not tier.get(record, into, soon()):
            return False
    except CorruptChunk:
        return False
    if [kernels.digest(p) for p in into] != record.digests:
        tier.quarantine(record.key)
        return False
    assert all(np.array_equal(a, b) for a, b in zip(into, payload, strict=True))
    return True


def present(tier, ids):
    return [i for i in ids if whole(tier, i)]


def on_disk(folder):
    total = 0
    for f in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # an index that has just taken its place
            total += f.stat().st_size
    return total


# ---- several at once ----


def test_several_at_once_are_stored_like_one_by_one_over_segments_and_restarts(tmp_path):
    tier = open_tier(tmp_path)
    fill(tier, [2])
    assert tier.put_many([chunk(i) for i in (0, 1, 2, 3, 1)], soon()) == [True] * 5
    assert tier.put_many([chunk(i) for i in range(4, 60)], soon()) == [True] * 56  # more than a segment takes
    assert tier.stats()["segments"] > 3
    assert all(s.end <= SEGMENT for s in tier._shelf.segments.values())
    tier.delete([chunk(1)[0].key])
    os.close(tier._lock_file)  # as if killed
    again = open_tier(tmp_path)
    assert present(again, range(60)) == [i for i in range(60) if i != 1]
    again.close()


def test_of_several_at_once_what_has_no_room_is_refused_and_the_rest_stored(tmp_path):
    tier = open_tier(tmp_path, 4 * SEGMENT)
    small, large = chunk(0), chunk(1, pages=4 * 64)
    assert tier.put_many([small, large, chunk(2)], soon()) == [True, False, True]
    assert present(tier, [0, 2]) == [0, 2]
    tier.close()


def test_several_at_once_that_fail_leave_nothing_and_say_so(tmp_path, monkeypatch):
    tier = open_tier(tmp_path)
    fill(tier, [0])
    whole_call = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: whole_call(fd, views[:5], at) and _fail(errno.EIO))
    with pytest.raises(TierError, match="failing"):
        tier.put_many([chunk(i) for i in range(1, 5)], soon())
    monkeypatch.undo()
    assert present(tier, range(5)) == [0]
    tier.close()
    again = open_tier(tmp_path)
    assert present(again, range(5)) == [0]
    again.close()


# ---- restarts ----


@pytest.mark.parametrize("index", ["kept", "removed", "damaged", "stale"])
def test_a_restart_finds_everything_with_or_without_its_index(tmp_path, index):
    tier = open_tier(tmp_path)
    fill(tier, range(20))
    if index == "stale":
        tier.save_index()
        fill(tier, range(20, 40))
        tier.delete([chunk(3)[0].key])
        tier.save_index = lambda: None
    tier.close()
    file = tmp_path / disk_index.FILE
    if index == "removed":
        file.unlink()
    if index == "damaged":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    again = open_tier(tmp_path)
    expected = [i for i in range(40) if i != 3] if index == "stale" else list(range(20))
    if index == "stale":
        assert not whole(again, 3)  # the index still lists it; its header says that it is gone
    assert present(again, range(40)) == expected
    again.close()


def test_a_torn_tail_is_cut_off_and_what_was_before_it_stays(tmp_path):
    tier = open_tier(tmp_path)
    fill(tier, range(6))
    tier.close()
    (tmp_path / disk_index.FILE).unlink()
    (file,) = tmp_path.glob("*.seg")
    size = file.stat().st_size
    for cut in (size - 1, size - 2 * PAGE, size - 6 * PAGE - 1):
        os.truncate(file, cut)
        again = open_tier(tmp_path)
        kept = present(again, range(6))
        assert kept == list(range(len(kept)))
        assert len(kept) in (4, 5)
        assert file.stat().st_size == PAGE + len(kept) * 7 * PAGE
        again.close()
        (tmp_path / disk_index.FILE).unlink()


def test_a_damaged_header_costs_its_own_record_only(tmp_path):
    tier = open_tier(tmp_path)
    fill(tier, range(6))
    tier.close()
    (tmp_path / disk_index.FILE).unlink()
    (file,) = tmp_path.glob("*.seg")
    with file.open("r+b") as f:
        f.seek(PAGE + 2 * 7 * PAGE + 40)
        f.write(b"\xff\xfe")
    again = open_tier(tmp_path)
    assert present(again, range(6)) == [0, 1, 3, 4, 5]
    fill(again, [2])
    assert present(again, range(6)) == list(range(6))
    again.close()


def test_an_index_is_saved_when_asked_but_not_again_and_again():
    saved = queue.Queue()
    seldom = disk_index.Saver(lambda: saved.put("seldom"), 3600.0)
    seldom.ask()
    assert saved.get(timeout=30) == "seldom"
    for _ in range(5):
        seldom.ask()
    seldom.close()  # does not wait for the hour to pass
    assert saved.empty()
    often = disk_index.Saver(lambda: saved.put("often"), 0.0)
    for _ in range(3):
        often.ask()
        assert saved.get(timeout=30) == "often"
    often.close()


def test_an_index_of_another_time_does_no_harm(tmp_path):
    """Segments are thrown away and their numbers used again; the old index then speaks of other files."""
    tier = open_tier(tmp_path)
    fill(tier, range(6))
    tier.save_index()
    old = (tmp_path / disk_index.FILE).read_bytes()
    tier.clear()
    assert present(tier, range(6)) == []
    fill(tier, range(10, 16))
    tier.close()
    (tmp_path / disk_index.FILE).write_bytes(old)
    again = open_tier(tmp_path)
    assert present(again, range(20)) == list(range(10, 16))
    again.close()


def test_deleted_chunks_stay_deleted_after_a_crash(tmp_path):
    tier = open_tier(tmp_path)
    fill(tier, range(6))
    tier.save_index()
    assert tier.delete([chunk(i)[0].key for i in (1, 4)]) == 2
    os.close(tier._lock_file)  # as if killed: no close()
    again = open_tier(tmp_path)
    assert present(again, range(6)) == [0, 2, 3, 5]
    again.close()


@pytest.mark.parametrize("why", [OSError(errno.EIO, "no"), TierError("disk: deadline passed")])
def test_what_was_written_but_not_noted_cannot_come_back_after_it_is_deleted(tmp_path, monkeypatch, why):
    tier = open_tier(tmp_path)
    fill(tier, [0])
    real = segments.write_records

    def written_all_the_same(*args):
        real(*args)
        raise why

    monkeypatch.setattr(segments, "write_records", written_all_the_same)
    with pytest.raises(TierError):
        tier.put_many([chunk(i) for i in (1, 2)], soon())
    monkeypatch.undo()
    tier._retry_at = 0.0
    fill(tier, [3])
    assert tier.delete([chunk(i)[0].key for i in (1, 2)]) == 0
    os.close(tier._lock_file)  # as if killed: no close()
    again = open_tier(tmp_path)
    assert present(again, range(4)) == [0, 3]
    again.close()


def test_a_disk_that_does_not_take_the_marks_says_so(tmp_path, monkeypatch):
    tier = open_tier(tmp_path)
    fill(tier, range(3))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: _fail(errno.EROFS))
    with pytest.raises(TierError, match="comes back with a restart"):
        tier.delete([chunk(i)[0].key for i in (0, 1)])
    monkeypatch.undo()
    assert present(tier, range(3)) == [2]
    tier.close()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("point", ["disk.put.written", "disk.compact.moved", "disk.compact.unlink"])
@pytest.mark.parametrize("index", ["kept", "removed"])
def test_what_is_deleted_after_a_kill_in_mid_move_does_not_come_back(tmp_path, point, index):
    """A chunk that is carried over stands in two segments for a moment: deleting it must reach both."""
    moving = False

    def fault(label):
        nonlocal moving
        moving = moving or label == "disk.compact.read"
        if moving and label == point:
            raise Killed

    def gone_like_killed(tier):
        os.close(tier._lock_file)

    tier = open_tier(tmp_path, 8 * SEGMENT, fault=fault)
    fill(tier, [0])
    assert whole(tier, 0)
    with pytest.raises(Killed):
        fill(tier, range(1, 1000))
    gone_like_killed(tier)
    again = open_tier(tmp_path, 8 * SEGMENT)
    assert whole(again, 0)
    assert again.delete([chunk(0)[0].key]) == 1
    gone_like_killed(again)
    if index == "removed":
        (tmp_path / disk_index.FILE).unlink(missing_ok=True)
    last = open_tier(tmp_path, 8 * SEGMENT)
    assert not whole(last, 0)
    last.close()


def test_segments_of_another_version_are_never_read_and_make_room(tmp_path, monkeypatch):
    tier = open_tier(tmp_path)
    fill(tier, range(6))
    tier.close()
    monkeypatch.setattr(segments, "DISK_FORMAT", segments.DISK_FORMAT + 1)
    again = open_tier(tmp_path)
    assert again.stats()["chunks"] == 0
    assert list(tmp_path.glob("*.seg")) == []
    again.close()


def test_a_folder_serves_one_daemon_at_a_time(tmp_path):
    tier = open_tier(tmp_path)
    with pytest.raises(StartError, match="another cache daemon already uses"):
        open_tier(tmp_path)
    tier.close()
    open_tier(tmp_path).close()


def test_a_folder_that_cannot_be_used_is_a_tier_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TierError, match="cannot use"):
        open_tier(tmp_path / "file" / "kv")


# ---- the cap ----


def test_the_cap_holds_at_every_moment_and_the_newest_stay(tmp_path):
    cap = 8 * SEGMENT
    tier = open_tier(tmp_path, cap)
    for i in range(200):
        fill(tier, [i])
        assert on_disk(tmp_path) <= cap
    kept = present(tier, range(200))
    assert kept == list(range(200 - len(kept), 200))
    assert len(kept) >= 40
    assert tier.stats()["evicted_chunks"] == 200 - len(kept)
    tier.close()
    assert on_disk(tmp_path) <= cap


def test_what_is_read_survives_its_segment(tmp_path):
    tier = open_tier(tmp_path, 8 * SEGMENT)
    for i in range(300):
        fill(tier, [i])
        assert i % 100 or whole(tier, 0), i
    assert tier.stats()["moved_chunks"] >= 1
    tier.close()
    again = open_tier(tmp_path, 8 * SEGMENT)
    assert whole(again, 0)
    again.close()


def test_whoever_watches_knows_what_is_there_whatever_happens_to_it(tmp_path):
    """Put, evicted and moved, deleted, quarantined, cleared: what was told is what stands in the index, each time."""
    tier = open_tier(tmp_path, size=4 * SEGMENT)
    fill(tier, range(3))
    known = set()

    def told(keys, here):
        known.update(keys) if here else known.difference_update(keys)

    def agrees():
        return known == {record.key for record in tier.records()}

    known.update(tier.watch(told))
    assert len(known) == 3
    assert whole(tier, 1)  # read since it was written: it is carried over when its segment goes
    fill(tier, range(3, 60))
    assert agrees()
    assert len(known) < 60
    kept = [i for i in range(60) if i.to_bytes(32, "little") in known]
    assert tier.delete([kept[0].to_bytes(32, "little")]) == 1
    tier.quarantine(kept[1].to_bytes(32, "little"))
    assert agrees()
    assert len(known) == len(kept) - 2
    tier.clear()
    assert known == set()
    tier.close()


def test_a_chunk_larger_than_the_cap_is_refused_and_nothing_goes_for_it(tmp_path):
    tier = open_tier(tmp_path, 2 * SEGMENT)
    fill(tier, range(3))
    record, payload = chunk(9, pages=100)
    assert tier.put(record, payload, soon()) is False
    assert present(tier, range(3)) == [0, 1, 2]
    tier.close()


def test_a_chunk_larger_than_a_segment_gets_one_of_its_own(tmp_path):
    tier = open_tier(tmp_path, 16 * SEGMENT)
    fill(tier, range(3))
    fill(tier, range(10, 13), pages=80, shards=1)
    fill(tier, range(3, 6))
    assert [whole(tier, i, pages=80, shards=1) for i in range(10, 13)] == [True] * 3
    assert present(tier, range(6)) == list(range(6))
    tier.close()


def test_segments_are_small_beside_what_the_file_system_has_whatever_the_cap(tmp_path, monkeypatch, caplog):
    """Else a disk that is smaller than its cap would be emptied as a whole each time that it is full."""
    real = os.statvfs(tmp_path)
    free = (150 << 20) // real.f_frsize

    class Small:
        f_frsize, f_bavail = real.f_frsize, free

    monkeypatch.setattr(os, "statvfs", lambda _: Small)
    monkeypatch.setattr(logging.getLogger("pdserve"), "propagate", True)
    tier = DiskTier(tmp_path, 10 << 30, min_free=0)
    assert tier.segment_bytes <= (150 << 20) // 4
    assert "10240 MiB are asked for" in caplog.text
    assert "room for 150 MiB" in caplog.text
    tier.close()


def test_the_floor_of_free_space_makes_the_tier_shrink_and_then_refuse(tmp_path, monkeypatch):
    tier = open_tier(tmp_path, min_free=100 * SEGMENT)
    fill(tier, range(20))
    before = tier.stats()["used_bytes"]
    room = 101 * SEGMENT
    monkeypatch.setattr(Room, "free", lambda self: room - on_disk(tmp_path))
    tier._room._look_at = 0.0  # as if a second had passed
    fill(tier, range(20, 24))
    assert tier.stats()["used_bytes"] < before
    assert on_disk(tmp_path) <= SEGMENT
    monkeypatch.setattr(Room, "free", lambda self: 0)
    tier._room._look_at = 0.0
    record, payload = chunk(99)
    assert tier.put(record, payload, soon()) is False
    assert tier.stats()["state"] == "no free space"
    tier.close()


# ---- disks that fail ----


@pytest.mark.parametrize(
    ("number", "state"),
    [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EIO, "failing: Input/output error")],
)
def test_writes_that_fail_leave_reads_alone_and_are_tried_again_later(tmp_path, monkeypatch, number, state):
    tier = open_tier(tmp_path)
    fill(tier, range(4))
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: real(fd, [views[0]], at) and _fail(number))
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
    monkeypatch.setattr(os, "preadv", lambda *a: _fail(errno.EIO))
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
            _fail(errno.EINVAL)
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


# ---- bits ----


def test_single_bit_flips_anywhere_never_give_a_wrong_answer(tmp_path):
    """Ten thousand flips, many to a round; each round opens what is there and reads all of it, with the index and without."""
    rng = np.random.default_rng()
    flips = wrong_seen = 0
    while flips < 10_000:
        folder = tmp_path / str(flips)
        tier = open_tier(folder)
        fill(tier, range(60), pages=1, shards=2)
        tier.close()
        files = sorted(f for f in folder.iterdir() if f.stat().st_size)
        for n in range(500):
            file = files[int(rng.integers(len(files)))]
            with file.open("r+b") as f:
                at = int(rng.integers(file.stat().st_size))
                # Every other one where the records are described.
                at = at // PAGE * PAGE + int(rng.integers(200)) if n % 2 else at
                at = min(at, file.stat().st_size - 1)
                f.seek(at)
                (byte,) = f.read(1)
                f.seek(at)
                f.write(bytes([byte ^ (1 << int(rng.integers(8)))]))
            flips += 1
        if rng.integers(2):
            (folder / disk_index.FILE).unlink()
        again = open_tier(folder)
        wrong_seen += 60 - sum(whole(again, i, pages=1, shards=2) for i in range(60))
        fill(again, range(60), pages=1, shards=2)
        assert all(whole(again, i, pages=1, shards=2) for i in range(60))
        again.close()
    assert wrong_seen


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
        _fail(errno.EROFS)

    monkeypatch.setattr(type(tier.path), "unlink", refuse)
    with pytest.raises(OSError, match="Read-only"):
        tier.clear()
    monkeypatch.undo()
    assert [i for i in range(8) if whole(tier, i)] == before
    assert tier.clear() == len(before)
    tier.close()
