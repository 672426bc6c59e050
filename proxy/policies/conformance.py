"""What every policy must do, as one call; a policy's own test adds its own cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.proxy.policies.base import Facts, Policy


@dataclass
class Dummy:
    name: str
    in_flight: int = 0
    host: str = "h"

    @property
    def load(self) -> int:
        return self.in_flight


def check_policy(make: Callable[[], Policy], facts: Facts = Facts("/v1/completions")) -> None:
    """Raises AssertionError with a sentence if the policies that `make` builds break the contract of base.py."""
    one = Dummy("only")
    assert make().pick(facts, [one]) is one, "a single candidate must be picked, whatever its load"

    fleet = [Dummy(f"d-{i}", in_flight=i % 2) for i in range(5)]
    before = [(d.name, d.in_flight) for d in fleet]
    policy = make()
    for _ in range(20):
        chosen = policy.pick(facts, fleet)
        assert any(chosen is d for d in fleet), "it must return one of the objects it was given"
    assert [(d.name, d.in_flight) for d in fleet] == before, "it must not change the candidates"

    # The fleet shrinks and grows while the policy's own state goes on.
    for size in (1, 4, 2, 5):
        assert policy.pick(facts, fleet[:size]) in fleet[:size], "it must cope with a fleet of another size"

    first, second = make(), make()
    assert [first.pick(facts, fleet).name for _ in range(10)] == [second.pick(facts, fleet).name for _ in range(10)], (
        "two fresh policies given the same must choose the same: nothing hidden may decide"
    )
    equal = [Dummy("a"), Dummy("b"), Dummy("c")]
    assert make().pick(facts, tuple(equal)) in equal, "a tuple is a sequence too"
    learner = make()
    learner.learn(facts, equal[1], 0)
    learner.learn(facts, equal[1], None)
    assert learner.pick(facts, equal) in equal, "learning must leave it able to choose"

    crowded = [Dummy("a", 1000), Dummy("b", 0), Dummy("c", 1000)]
    loaded = make()
    if facts.session or facts.blocks:
        loaded.pick(facts, [crowded[0]])
    picks = Counter(loaded.pick(facts, crowded).name for _ in range(30))
    assert picks["b"] >= 10, "no preference is worth a thousand requests in line"
