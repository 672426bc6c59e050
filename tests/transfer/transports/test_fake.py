"""The fake transport keeps the rules of all transports, and its faults do what they say."""

import asyncio

import numpy as np
import pytest

from pdserve.transfer.transports import conformance
from pdserve.transfer.transports.base import DeadlinePassed, Local, Outcome, PeerLost
from pdserve.transfer.transports.conformance.ends import landed, paired, pieces, raised, soon
from pdserve.transfer.transports.conformance.subject import Subject
from pdserve.transfer.transports.fake import FakeNetwork, FakeTransport


class FakeSubject(Subject):
    def __init__(self):
        self.network = FakeNetwork()

    def make(self, local):
        return FakeTransport(self.network, local)

    def url(self, name):
        return f"fake://{name}"

    def nobody(self):
        return "fake://nobody"

    def wedged(self):
        self.network.add("wedged", self.make(Local("wedged", np.zeros(1, "u1"))), None)
        self.network.wedged.add("wedged")
        return "fake://wedged"

    def stall(self, sender, receiver):
        self.network.faults(sender, receiver).stalled = True
        return True

    def resume(self, sender, receiver):
        self.network.faults(sender, receiver).stalled = False

    def cut(self, one, other):
        self.network.cut(one, other)
        return True


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_rule(rule):
    conformance.run(rule, FakeSubject())


def run(test):
    conformance.run(test, FakeSubject())


def test_a_cut_in_the_middle_of_a_segment():
    async def test(subject):
        async with paired(subject) as pair:
            subject.network.faults("a", "b").cut_after = 1
            await raised(PeerLost, pair.there.push(pieces(pair.a, [100_000] * 3), soon()))
            # Each end hears of it in its own time, in either order.
            for end in (pair.a, pair.b):
                await end.service.until(lambda end=end: bool(end.service.closed_because))
            assert "cut" in pair.a.service.closed_because[0]
            pair.check()

    run(test)


def test_a_changed_byte():
    async def test(subject):
        async with paired(subject) as pair:
            subject.network.faults("a", "b").corrupt_next = 1
            outcomes = await pair.there.push(pieces(pair.a, [100_000] * 2), soon())
            assert [o.state for o in outcomes] == ["corrupt", "arrived"]

    run(test)


def test_segments_in_another_order():
    async def test(subject):
        async with paired(subject) as pair:
            subject.network.faults("a", "b").reorder = True
            sent = pieces(pair.a, [5 << 20, 70_000, 3])
            assert await pair.there.push(sent, soon()) == [Outcome("arrived")] * 3
            assert landed(pair, sent)

    run(test)


def test_a_silent_way_is_given_up():
    async def test(subject):
        async with paired(subject) as pair:
            for session in (pair.there, pair.back):
                session.limits = conformance_limits()
            subject.network.faults("a", "b").silent = True
            await raised(DeadlinePassed, pair.there.call(b"?", soon(0.2)))
            await pair.b.service.until(lambda: bool(pair.b.service.closed_because))
            assert "nothing was heard" in pair.b.service.closed_because[0]
            await asyncio.sleep(0)

    run(test)


def conformance_limits():
    from pdserve.transfer.transports.plane import Limits

    return Limits(silence_s=0.5)
