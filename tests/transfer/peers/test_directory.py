"""The directory follows the event log whatever is lost, repeated or restarted in between."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.transfer.peers import directory, messages
from pdserve.transfer.peers.directory import Directory, EventLog, KeySet, short, shorts
from pdserve.transfer.peers.messages import Changes, Page


def key(i):
    return i.to_bytes(8, "little") + bytes(24)


def holds(book, peer, numbers):
    return book.holds(peer, shorts([key(i) for i in numbers])).tolist()


def settle(book, peer, log, limit=1000):
    for _ in range(limit):
        if not book.take(peer, log.answer(book.ask(peer))):
            return
    raise AssertionError("never settles")


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 50), max_size=20)), max_size=60))
def test_key_set_is_a_set(steps):
    ours, real = KeySet(), set()
    for add, numbers in steps:
        values = np.array(sorted(set(numbers)), np.uint64)
        none = np.empty(0, np.uint64)
        ours.update(*((values, none) if add else (none, values)))
        real = real | set(numbers) if add else real - set(numbers)
        assert len(ours) == len(real)
        assert ours.contains(np.arange(51, dtype=np.uint64)).tolist() == [i in real for i in range(51)]
    assert ours.array().tolist() == sorted(real)


def test_key_set_stays_small_and_right_over_many_changes():
    ours, real = KeySet(), set()
    rng = random.Random(3)
    for _ in range(200):
        some = {rng.randrange(20000) for _ in range(300)}
        ours.update(np.array(sorted(some), np.uint64), np.empty(0, np.uint64))
        gone = {rng.randrange(20000) for _ in range(250)}
        ours.update(np.empty(0, np.uint64), np.array(sorted(gone), np.uint64))
        real = (real | some) - gone
    assert set(ours.array().tolist()) == real
    assert ours._sorted.nbytes == 8 * len(real)


step = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 30)),
    st.tuples(st.just("remove"), st.integers(0, 30)),
    st.tuples(st.just("sync"), st.just(0)),
    st.tuples(st.just("lost"), st.just(0)),  # asked and answered, but the answer got lost
    st.tuples(st.just("twice"), st.just(0)),  # an answer that comes a second time
    st.tuples(st.just("restart"), st.integers(0, 30)),
)


@settings(max_examples=300)
@given(st.lists(step, max_size=80), st.integers(1, 8))
def test_directory_ends_up_with_what_the_peer_has(steps, log_length):
    """After a quiet moment the directory is exactly right; a log that is too short for the gap only costs a full resync."""
    log, book, real, starts, last = EventLog("start-0", log_length), Directory(), set(), 0, None
    for what, number in steps:
        match what:
            case "add":
                log.note(number, True)
                real.add(number)
            case "remove":
                log.note(number, False)
                real.discard(number)
            case "sync":
                last = log.answer(book.ask("p"))
                book.take("p", last)
            case "lost":
                log.answer(book.ask("p"))
            case "twice" if last is not None:
                book.take("p", last)
            case "restart":
                starts += 1
                log, real = EventLog(f"start-{starts}", log_length), set()
                log.note(number, True)
                real.add(number)
    settle(book, "p", log)
    assert holds(book, "p", range(31)) == [i in real for i in range(31)]
    assert book.size("p") == len(real)


def test_everything_comes_in_parts_while_it_changes(monkeypatch):
    monkeypatch.setattr(directory, "MAX_KEYS", 10)
    log, book = EventLog("e"), Directory()
    for i in range(95):
        log.note(i, True)
    parts = 0
    while book.take("p", log.answer(book.ask("p"))):
        log.note(parts, False)  # one that has been told
        log.note(1000 - parts, True)  # one that is still to be told
        parts += 1
        if parts >= 12:
            break
    settle(book, "p", log)
    assert parts >= 10
    assert holds(book, "p", range(1001)) == [parts <= i < 95 or i > 1000 - parts for i in range(1001)]


def test_what_a_restarted_host_had_dies_at_once():
    resyncs = []
    log, book = EventLog("first"), Directory(on_resync=resyncs.append)
    for i in range(20):
        log.note(i, True)
    settle(book, "p", log)
    again = EventLog("second")
    again.note(5, True)
    book.take("p", again.answer(book.ask("p")))
    assert holds(book, "p", range(20)) == [i == 5 for i in range(20)]
    assert resyncs == ["p"]


def test_what_was_here_from_the_beginning_is_told_and_may_go():
    log, book = EventLog("e"), Directory()
    log.begin(shorts([key(i) for i in range(5)]))
    log.note(3, False)
    settle(book, "p", log)
    assert holds(book, "p", range(6)) == [True, True, True, False, True, False]


def test_a_gap_makes_it_forget_rather_than_guess():
    book = Directory()
    book.take("p", Page("e", 5, 0, shorts([key(1)]).tobytes(), -1))
    assert holds(book, "p", [1]) == [True]
    assert book.take("p", Changes("e", 7, 9, b"", b""))  # 5 to 7 is missing
    assert holds(book, "p", [1]) == [False]
    assert book.ask("p") == messages.Sync("", 0, 0)


def test_parts_that_do_not_advance_end():
    book = Directory()
    assert not book.take("p", Page("e", 5, 0, b"", 0))
    assert book.size("p") == 0


def test_memory_of_one_peer_is_bounded():
    book = Directory(limit=100)
    log = EventLog("e")
    for i in range(500):
        log.note(i, True)
    settle(book, "p", log)
    assert book.size("p") <= 100


def test_peers_do_not_mix():
    book = Directory()
    for name, number in (("a", 1), ("b", 2)):
        log = EventLog(name)
        log.note(number, True)
        settle(book, name, log)
    assert holds(book, "a", [1, 2]) == [True, False]
    assert holds(book, "b", [1, 2]) == [False, True]
    book.forget("a")
    assert holds(book, "a", [1, 2]) == [False, False]
    assert short(key(2)) == 2
