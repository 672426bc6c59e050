from __future__ import annotations

import re
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.proxy import lifetime
from pdserve.proxy.lifetime import LIVE, TERMINAL, TRANSITIONS, Deadlines, Event, Lifetime, State


@given(st.lists(st.sampled_from(Event)))
def test_a_request_reaches_at_most_one_terminal_state_and_stays_there(events: list[Event]) -> None:
    life, reached = Lifetime(), []
    for event in events:
        before = life.state
        if (before, event) in TRANSITIONS:
            life.on(event)
        else:
            with pytest.raises(KeyError):
                life.on(event)
            assert life.state is before
        if life.over and (not reached or reached[-1] is not life.state):
            reached.append(life.state)
    assert len(reached) <= 1


def test_every_live_state_can_fail_be_left_and_come_to_a_good_end() -> None:
    assert {*LIVE, *TERMINAL} == set(State)
    for state in LIVE:
        assert TRANSITIONS[state, Event.ERROR] is State.FAILED
        assert TRANSITIONS[state, Event.GONE] is State.ABORTED
    good, todo = {State.DONE}, True
    while todo:
        todo = False
        for (state, event), after in TRANSITIONS.items():
            if after in good and state not in good and event not in (Event.ERROR, Event.GONE):
                good.add(state)
                todo = True
    assert good >= set(LIVE)


def test_every_deadline_is_bounded_and_described() -> None:
    assert all(0 < getattr(Deadlines(), f.name) < 3600 for f in fields(Deadlines))
    assert lifetime.__doc__ is not None
    assert set(re.findall(r"--(\w+)-->|--(\w+)--", lifetime.__doc__))
