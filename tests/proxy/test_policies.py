from __future__ import annotations

from collections import Counter

import pytest

from pdserve.errors import ConfigError
from pdserve.proxy.policies import base
from pdserve.proxy.policies.base import Facts
from pdserve.proxy.policies.conformance import Dummy, check_policy

FACTS = Facts("/v1/completions")


ALL = [FACTS, Facts("/v1/completions", 2048, "s-1"), Facts("/v1/completions", 4096, "", (1, 2, 3, 4))]


@pytest.mark.parametrize("facts", ALL)
@pytest.mark.parametrize("name", base.names())
def test_every_policy_keeps_the_contract(name: str, facts: Facts) -> None:
    check_policy(lambda: base.make(name), facts)


def test_an_unknown_policy_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Known policies: round_robin, least_load, power"):
        base.make("round-robin")


def test_round_robin_takes_each_in_turn() -> None:
    policy, fleet = base.make("round_robin"), [Dummy("a"), Dummy("b", 9), Dummy("c")]
    assert [policy.pick(FACTS, fleet).name for _ in range(7)] == list("abcabca")


def test_least_load_takes_the_idlest_and_spreads_over_equals() -> None:
    policy = base.make("least_load")
    assert policy.pick(FACTS, [Dummy("a", 2), Dummy("b", 1), Dummy("c", 2)]).name == "b"
    equal = [Dummy("a", 1), Dummy("b", 1), Dummy("c", 5)]
    assert Counter(policy.pick(FACTS, equal).name for _ in range(10)) == {"a": 5, "b": 5}


def sessions(n: int) -> list[Facts]:
    return [Facts("/v1/chat/completions", 10, f"s-{i}") for i in range(n)]


def test_a_session_stays_where_it_is_and_few_move_when_an_engine_leaves() -> None:
    policy, fleet = base.make("session"), [Dummy(f"d-{i}") for i in range(5)]
    before = {f.session: policy.pick(f, fleet).name for f in sessions(500)}
    assert {f.session: base.make("session").pick(f, fleet).name for f in sessions(500)} == before
    spread = Counter(before.values())
    assert min(spread.values()) > 40
    after = {f.session: policy.pick(f, fleet[:4]).name for f in sessions(500)}
    assert all(after[s] == name for s, name in before.items() if name != "d-4")


def test_a_session_is_not_worth_an_overload() -> None:
    policy, fleet = base.make("session"), [Dummy(f"d-{i}") for i in range(4)]
    facts = Facts("/v1/completions", 10, "heavy")
    for _ in range(40):
        policy.pick(facts, fleet).in_flight += 1
    assert max(d.in_flight for d in fleet) <= 13  # 1.25 times the average of ten


def test_prefix_follows_the_longest_match_and_forgets_an_engine_that_is_gone() -> None:
    policy, fleet = base.make("prefix"), [Dummy(f"d-{i}") for i in range(3)]
    first = policy.pick(Facts("", 0, "", (1, 2, 3)), fleet)
    other = policy.pick(Facts("", 0, "", (1, 9)), fleet)
    assert other is first
    far = policy.pick(Facts("", 0, "", (7, 8)), fleet)
    assert far is not first
    assert policy.pick(Facts("", 0, "", (1, 2, 3, 4)), fleet) is first
    assert policy.pick(Facts("", 0, "", (7, 8, 5)), fleet) is far
    assert policy.pick(Facts("", 0, "", (1, 2)), [d for d in fleet if d is not first]) is not first


def test_chunk_location_learns_from_replies_and_unlearns_too() -> None:
    policy = base.make("chunk_location")
    fleet = [Dummy("a", host="one"), Dummy("b", host="two"), Dummy("c", host="two")]
    facts = Facts("", 0, "", tuple(range(10)))
    policy.learn(facts, fleet[1], 0)
    assert {policy.pick(facts, fleet).name for _ in range(5)} == {"b"}
    fleet[1].in_flight = 2  # its neighbour loads from the same cache
    assert {policy.pick(facts, fleet).name for _ in range(5)} == {"c"}
    policy.learn(facts, fleet[0], 0)  # nothing was there any more
    fleet[1].in_flight = 0
    assert {policy.pick(facts, fleet).name for _ in range(5)} == {"a"}


def test_power_of_two_never_takes_the_busiest_of_three() -> None:
    policy, fleet = base.make("power_of_two"), [Dummy("a", 9), Dummy("b", 1), Dummy("c", 2)]
    picks = Counter(policy.pick(FACTS, fleet).name for _ in range(60))
    assert picks["a"] == 0
    assert min(picks["b"], picks["c"]) > 5
