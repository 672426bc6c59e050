"""The disk tier after a restart or a kill: what is found again, and what must not be."""

import errno
import os
import queue

import pytest
from disk_chunks import SEGMENT, chunk, fail, fill, open_tier, present, soon, whole

from pdserve.errors import StartError
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import disk_index, segments
from pdserve.transfer.tiers.base import TierError


@pytest.fixture
def unindexed(tmp_path):
    """The one segment of a tier that was closed with six chunks in it, and whose index is gone."""
    tier = open_tier(tmp_path)
    fill(tier, range(6))
    tier.close()
    (tmp_path / disk_index.FILE).unlink()
    (file,) = tmp_path.glob("*.seg")
    return file


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


def test_a_torn_tail_is_cut_off_and_what_was_before_it_stays(tmp_path, unindexed):
    file, size = unindexed, unindexed.stat().st_size
    for cut in (size - 1, size - 2 * PAGE, size - 6 * PAGE - 1):
        os.truncate(file, cut)
        again = open_tier(tmp_path)
        kept = present(again, range(6))
        assert kept == list(range(len(kept)))
        assert len(kept) in (4, 5)
        assert file.stat().st_size == PAGE + len(kept) * 7 * PAGE
        again.close()
        (tmp_path / disk_index.FILE).unlink()


def test_a_damaged_header_costs_its_own_record_only(tmp_path, unindexed):
    with unindexed.open("r+b") as f:
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
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: fail(errno.EROFS))
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
