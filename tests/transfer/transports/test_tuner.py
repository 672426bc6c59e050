"""The number of streams: climbs where it helps, comes back where it does not, keeps still in noise."""

import random

from pdserve.transfer.transports.tuner import WINDOW_BYTES, Tuner


def drive(tuner, speed, windows, rng=None):
    """Feeds full windows at speed(count) bytes a second; returns the counts used."""
    now, counts = 0.0, []
    for _ in range(windows):
        counts.append(tuner.count)
        rate = speed(tuner.count) * (rng.uniform(0.97, 1.03) if rng else 1)
        tuner.sent(0, now, True) if now == 0 else None
        now += WINDOW_BYTES / rate + 1e-9
        now = max(now, 0.06 * len(counts))
        tuner.sent(WINDOW_BYTES, now, True)
    return counts


def test_climbs_where_every_stream_is_held_back():
    """A long way: each stream carries what its window allows."""
    counts = drive(Tuner(8), lambda n: n * 50e6, 400, random.Random(1))
    assert counts[-1] >= 7


def test_stays_at_one_where_one_fills_the_link():
    counts = drive(Tuner(8), lambda n: 400e6, 400, random.Random(2))
    assert max(counts) <= 2
    assert counts.count(1) > 300


def test_trials_that_fail_become_rare():
    counts = drive(Tuner(4), lambda n: 300e6 / n, 600)
    first, last = counts[:150].count(2), counts[-150:].count(2)
    assert 0 < last < first


def test_idle_time_is_not_measured():
    tuner = Tuner(4)
    for i in range(1000):
        tuner.sent(1 << 20, float(i), False)
    assert tuner.count == 1


def bursts(tuner, speed, count, pieces):
    """Pushes of so many pieces of 4 MiB, a second apart; returns the counts used."""
    now, counts = 0.0, []
    for _ in range(count):
        now += 1.0
        for left in reversed(range(pieces)):
            counts.append(tuner.count)
            now += (4 << 20) / speed(tuner.count)
            tuner.sent(4 << 20, now, left > 0)
    return counts


def test_pushes_that_are_over_soon_count_together():
    """64 MiB at 6 GB/s take 11 ms: less than a window, push after push."""
    assert bursts(Tuner(4), lambda n: 6e9 * min(n, 2), 600, 16)[-1] == 2
    assert bursts(Tuner(4), lambda n: 6e9, 600, 16).count(1) > 7000


def test_what_lies_between_pushes_is_not_measured():
    """Were it, a second stream would look no faster: nearly all of the time is idle."""
    seen = []
    tuner = Tuner(4)
    tuner._judge = seen.append
    bursts(tuner, lambda n: 6e9, 300, 4)
    assert seen
    assert all(5.9e9 < rate < 6.1e9 for rate in seen)


def test_a_push_of_one_piece_says_nothing_of_streams():
    assert set(bursts(Tuner(4), lambda n: 6e9 * n, 3000, 1)) == {1}


def test_all_streams_always_where_told_so():
    tuner = Tuner(1, adapt=False)
    tuner.allow(4)
    drive(tuner, lambda n: 1e6, 50)
    assert tuner.count == 4
