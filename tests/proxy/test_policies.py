from __future__ import annotations

from collections import Counter

import pytest

from pdserve.errors import ConfigError
from pdserve.proxy.policies import base
from pdserve.proxy.policies.base import Facts
from pdserve.proxy.policies.conformance import Dummy, check_policy

FACTS = Facts("/v1/completions")


@pytest.mark.parametrize("name", base.names())
def test_every_policy_keeps_the_contract(name: str) -> None:
    check_policy(lambda: base.make(name))


def test_an_unknown_policy_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Known policies: round_robin, least_load"):
        base.make("round-robin")


def test_round_robin_takes_each_in_turn() -> None:
    policy, fleet = base.make("round_robin"), [Dummy("a"), Dummy("b", 9), Dummy("c")]
    assert [policy.pick(FACTS, fleet).name for _ in range(7)] == list("abcabca")


def test_least_load_takes_the_idlest_and_spreads_over_equals() -> None:
    policy = base.make("least_load")
    assert policy.pick(FACTS, [Dummy("a", 2), Dummy("b", 1), Dummy("c", 2)]).name == "b"
    equal = [Dummy("a", 1), Dummy("b", 1), Dummy("c", 5)]
    assert Counter(policy.pick(FACTS, equal).name for _ in range(10)) == {"a": 5, "b": 5}
