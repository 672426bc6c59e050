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


def test_all_streams_always_where_told_so():
    tuner = Tuner(1, adapt=False)
    tuner.allow(4)
    drive(tuner, lambda n: 1e6, 50)
    assert tuner.count == 4
