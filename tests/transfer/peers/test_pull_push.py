"""What to ask of whom, and what to send to whom: pure."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pdserve.transfer.peers import pull
from pdserve.transfer.peers.messages import DISK, MEMORY
from pdserve.transfer.peers.pull import Holder, decide, plan, worth
from pdserve.transfer.peers.push import Outbox, Wanted
from pdserve.transfer.peers.rising import Rising


def test_equal_peers_share_the_run():
    a, b = Holder("a", 100.0), Holder("b", 100.0)
    made = plan([[a, b]] * 10, 100)
    assert {url: len(part) for (url, _), part in made.parts.items()} == {"a": 5, "b": 5}
    assert made.seconds == pull.OVERHEAD_S + 5.0


def test_a_busy_or_slow_peer_gets_less():
    fast, slow, busy = Holder("fast", 1000.0), Holder("slow", 100.0), Holder("busy", 1000.0, queued_s=10.0)
    made = plan([[fast, slow, busy]] * 20, 1000)
    counts = [len(made.parts.get((name, MEMORY), ())) for name in ("fast", "busy", "slow")]
    assert counts[0] > counts[1] > counts[2]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), min_size=1, max_size=30),
    st.lists(st.integers(1, 1000), min_size=4, max_size=4),
)
def test_every_chunk_is_asked_of_one_that_has_it_and_the_time_is_the_slowest_part(holders, speeds):
    run = [[Holder(str(h), float(speeds[h])) for h in some] for some in holders]
    made = plan(run, 100)
    assert sorted(itertools.chain(*made.parts.values())) == list(range(len(run)))
    for (url, _), part in made.parts.items():
        assert all(int(url) in holders[i] for i in part)
    slowest = max(len(part) * 100 / speeds[int(url)] for (url, _), part in made.parts.items())
    assert abs(made.seconds - pull.OVERHEAD_S - slowest) < 1e-6
    # Never worse than asking one peer for all that it has.
    for only in range(4):
        if all(only in some for some in holders):
            assert slowest <= len(run) * 100 / speeds[only] + 1e-9


def test_taken_only_if_faster_than_computing():
    assert worth(1000, 0.5, 1000.0)
    assert not worth(1000, 0.95, 1000.0)  # the prediction is rough: it must be clearly faster
    assert not worth(1000, 2.0, 1000.0)
    assert worth(int(pull.PREFILL_SPEED), 0.5, 0.0)  # no engine has said how fast it is


def test_a_disk_is_as_fast_as_it_is_whatever_the_link():
    memory, disk = Holder("a", 1000.0), Holder("b", 10.0, place=DISK)
    assert not decide([[disk]], 100, 256, 1000.0, 60.0)[1]  # 10 s for 256 tokens ...
    made, good = decide([[memory], [disk]], 100, 256, 10.0, 60.0)  # ... and for 512, which a slow engine computes in 51
    assert (good, made.seconds) == (True, pull.OVERHEAD_S + 10.0)
    assert made.parts == {("a", MEMORY): [0], ("b", DISK): [1]}
    for prefill_speed, at_most_s in ((1000.0, 60.0), (10.0, 5.0)):  # computing is faster; it would not be here in time
        made, good = decide([[memory], [disk]], 100, 256, prefill_speed, at_most_s)
        assert (good, made.parts) == (True, {("a", MEMORY): [0]})  # what comes before it, alone
        assert not decide([[disk], [memory]], 100, 256, prefill_speed, at_most_s)[1]  # the first is the slow one


def test_what_is_in_memory_comes_before_what_must_be_read_first():
    memory, disk = Holder("a", 1000.0), Holder("b", 900.0, place=DISK)
    assert plan([[disk, memory]], 100).parts == {("a", MEMORY): [0]}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from("ab"), st.sampled_from(["add", "begin", "take", "forget", "expire"])
        )
    )
)
def test_rising_keeps_nothing_that_nobody_waits_for(steps):
    rising, real, begun = Rising(limit=4), {}, set()
    for now, (number, target, what) in enumerate(steps):
        key = bytes([number])
        match what:
            case "add":
                fits = key in real or len(real) < 4
                assert rising.add(key, target, now + 3.0) is fits
                if fits:
                    real.setdefault(key, {})[target] = now + 3.0
            case "begin":
                following = [k for k in real if k not in begun]
                assert rising.waiting(2) == following[:2]
                if following:
                    rising.begin(following[-1])
                    begun.add(following[-1])
            case "take":
                assert set(rising.take(key)) == set(real.pop(key, {}))
            case "forget":
                rising.forget(target)
                real = {k: left for k, ends in real.items() if (left := {t: e for t, e in ends.items() if t != target})}
            case "expire":
                rising.expire(now)
                real = {k: left for k, ends in real.items() if (left := {t: e for t, e in ends.items() if e > now})}
        begun &= real.keys()
        assert (len(rising), rising.begun) == (len(real), len(begun))


class Piece:
    """Stands for a chunk of the store."""

    def __init__(self, number, size=10):
        self.key, self.size = number.to_bytes(32, "big"), size


def test_wanted_keys_are_sent_once_to_each_and_forgotten_in_time():
    wanted = Wanted(limit=3, seconds=10.0)
    assert wanted.add(b"k", "a", 0.0)
    assert wanted.add(b"k", "b", 1.0)
    assert wanted.add(b"k", "a", 2.0)  # again: only its time is renewed
    assert wanted.add(b"l", "a", 2.0)
    assert not wanted.add(b"m", "a", 2.0)  # full
    assert wanted.expire(11.5) == 1  # b's
    assert wanted.take(b"k") == ["a"]
    assert wanted.take(b"k") == []
    wanted.forget("a")
    assert len(wanted) == 0


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc"), st.sampled_from(["add", "take", "forget", "expire"])))
)
def test_wanted_never_keeps_what_nobody_can_take(steps):
    wanted, real = Wanted(limit=8, seconds=3.0), {}
    for now, (number, target, what) in enumerate(steps):
        key = bytes([number])
        match what:
            case "add":
                if (key, target) in real or len(real) < 8:
                    real[key, target] = now + 3.0
                wanted.add(key, target, now)
            case "take":
                assert set(wanted.take(key)) == {t for k, t in real if k == key}
                real = {pair: ends for pair, ends in real.items() if pair[0] != key}
            case "forget":
                wanted.forget(target)
                real = {pair: ends for pair, ends in real.items() if pair[1] != target}
            case "expire":
                wanted.expire(now)
                real = {pair: ends for pair, ends in real.items() if ends > now}
        assert len(wanted) == len(real)


def test_outbox_counts_and_never_holds_a_chunk_twice():
    box = Outbox()
    one, two, three = Piece(1), Piece(2), Piece(3, size=100)
    assert box.add(one)
    assert not box.add(one)
    assert box.add(two)
    assert box.add(three)
    batch = box.take(25)
    assert batch == [one, two]
    assert box.nbytes == 120  # what is being sent is still held
    assert not box.add(one)
    assert box.take(25) == [three]  # larger than a batch: alone
    for chunk in (one, two, three):
        box.done(chunk)
    assert (box.nbytes, box.keys) == (0, set())
    box.add(one)
    assert box.clear() == [one]
    assert (box.nbytes, box.keys) == (0, set())
