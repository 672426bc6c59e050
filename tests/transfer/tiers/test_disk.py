"""The disk tier: the rules of every tier, several chunks at once, the cap, flipped bits."""

import errno
import logging
import os

import numpy as np
import pytest
from disk_chunks import SEGMENT, chunk, fail, fill, on_disk, open_tier, present, soon, whole

from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import conformance, disk_index, segments
from pdserve.transfer.tiers.base import TierError
from pdserve.transfer.tiers.disk import DiskTier
from pdserve.transfer.tiers.disk_room import Room


class DiskSubject(conformance.Subject):
    def __init__(self, folder):
        self.folder = folder
        self.last = None

    def open(self):
        return DiskTier(self.folder, 64 << 20, min_free=0)

    def break_put(self, tier, record, payload):
        whole, os.pwritev = (
            os.pwritev,
            lambda fd, views, at: whole(fd, [views[0], views[1][:PAGE]], at) and fail(errno.EIO),
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


# One process owns the folder: rules that open the tier twice at once do not apply; their content is tested below.
RULES = [
    r
    for r in conformance.RULES
    if r.__name__ not in ("a_new_tier_finds_what_an_old_one_stored", "half_a_chunk_is_never_seen")
]


@pytest.mark.parametrize("rule", RULES, ids=conformance.name_of)
def test_rule(rule, tmp_path):
    rule(DiskSubject(tmp_path / "kv"))


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
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: whole_call(fd, views[:5], at) and fail(errno.EIO))
    with pytest.raises(TierError, match="failing"):
        tier.put_many([chunk(i) for i in range(1, 5)], soon())
    monkeypatch.undo()
    assert present(tier, range(5)) == [0]
    tier.close()
    again = open_tier(tmp_path)
    assert present(again, range(5)) == [0]
    again.close()


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
