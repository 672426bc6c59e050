"""The book of lent slots: who may write, and when a slot is over."""

import itertools
import random
import threading

import numpy as np
import pytest

from pdserve import kernels
from pdserve.errors import ProtocolError
from pdserve.kernels import receive
from pdserve.transfer.transports.base import ARRIVED, Outcome, Piece, Slot
from pdserve.transfer.transports.ledger import Ledger
from pdserve.transfer.transports.outbox import Outbox, Parcel

KEY = b"k" * 32
GONE = Outcome("cancelled", "not wanted")


def book(verify=True):
    arena = np.zeros(1 << 16, np.uint8)
    ended = []
    return arena, ended, Ledger(arena, lambda slot, outcome: ended.append((slot, outcome)), verify=verify)


def test_a_slot_is_over_when_all_its_bytes_are_there():
    arena, ended, ledger = book()
    slot = Slot(64, 1000)
    data = np.arange(1000, dtype=np.uint8)
    ticket = ledger.lend(slot, KEY, 1, kernels.digest(data), 1e9)
    for start in (500, 0):
        view = ledger.enter(ticket, KEY, 1, 1000, start, 500)
        view[:] = data[start : start + 500].tobytes()
        assert not ended
        ledger.leave(ticket, 500)
    assert ended == [(slot, ARRIVED)]
    assert (arena[64:1064] == data).all()
    assert ledger.enter(ticket, KEY, 1, 1000, 0, 500) is None
    assert len(ledger) == 0


def test_the_last_writer_ends_it_not_the_one_who_cancels():
    _, ended, ledger = book()
    slot = Slot(0, 1000)
    ticket = ledger.lend(slot, KEY, 0, 0, 1e9)
    for start in (0, 500):
        assert ledger.enter(ticket, KEY, 0, 1000, start, 500) is not None
    ledger.end([ticket], GONE)
    assert not ended
    assert not ledger.wanted(ticket)
    assert ledger.lingering([ticket])
    assert ledger.enter(ticket, KEY, 0, 1000, 0, 10) is None  # nobody else comes in
    ledger.leave(ticket, 500)
    assert not ended
    ledger.leave(ticket, 500)
    assert ended == [(slot, GONE)]
    assert not ledger.lingering([ticket])


@pytest.mark.parametrize(
    "wrong",
    [
        (b"x" * 32, 0, 1000, 0, 10),
        (KEY, 1, 1000, 0, 10),
        (KEY, 0, 999, 0, 10),
        (KEY, 0, 1000, 995, 10),
        (KEY, 0, 1000, 0, 0),
    ],
)
def test_bytes_that_cannot_belong_there(wrong):
    _, ended, ledger = book()
    ticket = ledger.lend(Slot(0, 1000), KEY, 0, 0, 1e9)
    with pytest.raises(ProtocolError):
        ledger.enter(ticket, *wrong)
    assert not ended
    with pytest.raises(ProtocolError, match="never given out"):
        ledger.enter(ticket + 1, KEY, 0, 1000, 0, 10)


def test_the_same_bytes_twice():
    _, _, ledger = book()
    ticket = ledger.lend(Slot(0, 1000), KEY, 0, 0, 1e9)
    ledger.enter(ticket, KEY, 0, 1000, 0, 600)
    for start, length in ((0, 600), (500, 500)):
        with pytest.raises(ProtocolError, match="twice"):
            ledger.enter(ticket, KEY, 0, 1000, start, length)


def test_deadlines_and_the_end():
    _, ended, ledger = book()
    early, late = Slot(0, 10), Slot(64, 10)
    tickets = [ledger.lend(early, KEY, 0, 0, 5.0), ledger.lend(late, KEY, 0, 0, 50.0)]
    assert ledger.expired(10.0) == tickets[:1]
    ledger.close(Outcome("lost", "over"))
    assert {slot for slot, _ in ended} == {early, late}
    with pytest.raises(ProtocolError, match="over"):
        ledger.lend(Slot(0, 10), KEY, 0, 0, 1e9)


def test_digests_are_compared_only_where_wanted():
    for verify, state in ((True, "corrupt"), (False, "arrived")):
        _, ended, ledger = book(verify)
        ticket = ledger.lend(Slot(0, 8), KEY, 0, 12345, 1e9)
        ledger.enter(ticket, KEY, 0, 8, 0, 8)
        ledger.leave(ticket, 8)
        assert ended[0][1].state == state


def test_threads_that_write_while_others_cancel():
    """Many rounds of writers against a canceller: each slot ends once, and nobody writes after its end."""
    arena = np.zeros(1 << 16, np.uint8)
    over, broken = set(), []
    lock = threading.Lock()

    def finished(slot, outcome):
        with lock:
            if slot in over:
                broken.append("twice")
            over.add(slot)

    ledger = Ledger(arena, finished, verify=False)
    slots = [Slot(i * 64, 40) for i in range(800)]
    tickets = [ledger.lend(slot, KEY, 0, 0, 1e9) for slot in slots]

    def write(seed):
        rng = random.Random(seed)
        order = list(range(800))
        rng.shuffle(order)
        for i in order:
            view = ledger.enter(tickets[i], KEY, 0, 40, seed * 10, 10)
            if view is None:
                continue
            with lock:
                if slots[i] in over:
                    broken.append("written after its end")
            view[:] = bytes([seed]) * 10
            ledger.leave(tickets[i], 10)

    def cancel():
        for i in range(0, 800, 3):
            ledger.end([tickets[i]], GONE)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)] + [threading.Thread(target=cancel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not broken
    assert over == set(slots)


# ---- the outbox ----


def test_credit_and_withdrawing():
    idle = []
    box = Outbox(100, 400)
    parcel = Parcel(lambda: idle.append(True))
    box.put([(1, Piece(KEY, 0, 0, 1000, 0))], parcel)
    taken = box.take(1 << 20, 100, 0)
    assert [s.start for s in taken] == [0, 100, 200, 300]  # no more than the credit
    assert box.take(1 << 20, 100, 0) == []
    box.gone(taken)
    assert idle == [True]
    box.add_credit(100)
    (last,) = box.take(1 << 20, 100, 0)
    box.withdraw(parcel)
    box.add_credit(400)
    assert box.take(1 << 20, 100, 0) == []
    assert parcel.in_hand == 1  # the arena is still read
    box.gone([last])
    assert parcel.in_hand == 0
    assert box.queued_bytes == 0


def test_what_the_receiver_ended_is_not_sent():
    box = Outbox(100, 1000)
    box.put([(1, Piece(KEY, 0, 0, 200, 0)), (2, Piece(KEY, 0, 0, 50, 0))], Parcel(lambda: None))
    box.end([1])
    assert [s.ticket for s in box.take(1 << 20, 100, 0)] == [2]
    box.close()
    assert box.take(1 << 20, 100, 5) == []


def parts_of(data, cuts):
    return [(a, b - a, receive.part(data[a:b], a // 8)) for a, b in itertools.pairwise(cuts)]


@pytest.mark.skipif(not receive.available(), reason="no C++ compiler is installed")
@pytest.mark.parametrize(("wrong", "without"), [(0, None), (1, None), (0, 2), (1, 2)])
def test_parts_of_a_digest_add_up(wrong, without):
    """Segments bring their part of the digest; one that does not makes the piece be read once more."""
    _, ended, ledger = book()
    data = np.arange(1000, dtype=np.uint8)
    ticket = ledger.lend(Slot(64, 1000), KEY, 1, kernels.digest(data) + wrong, 1e9)
    for i, (start, length, part) in enumerate(parts_of(data, [0, 400, 504, 1000])):
        ledger.enter(ticket, KEY, 1, 1000, start, length)[:] = data[start : start + length].tobytes()
        ledger.leave(ticket, length, None, None if i == without else part)
    assert ended[0][1].state == ("corrupt" if wrong else "arrived")


def test_which_segments_may_bring_their_part():
    ledger = book()[2]
    assert ledger.word_of(0, 1000, 1000) == 0
    assert ledger.word_of(800, 200, 1003) == 100
    assert ledger.word_of(800, 203, 1003) == 100  # the last may end anywhere
    assert ledger.word_of(804, 8, 1003) is None
    assert ledger.word_of(0, 203, 1003) is None
    assert book(verify=False)[2].word_of(0, 8, 8) is None
