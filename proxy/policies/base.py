"""Choosing an instance. A policy only picks; it never sends, waits, retries or looks anything up.

Contract of `pick`:
- synchronous and quick; no I/O, no clock, no randomness that was not passed in at construction;
- `candidates` is not empty, holds only instances that are up and of the right role, in the fleet's stable order;
- returns one of them, the very object; changes none of them;
- may keep state of its own (a counter, a ring), which belongs to that one policy object: the fleet makes one for
  producers and one for consumers.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pdserve.errors import ConfigError

_NAMES = ("round_robin", "least_load")


class Candidate(Protocol):
    """What a policy may know of an instance."""

    @property
    def name(self) -> str: ...

    @property
    def in_flight(self) -> int:
        """Requests that this proxy has running on it now."""


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a policy may know of a request."""

    endpoint: str
    prompt_bytes: int = 0


class Policy(Protocol):
    def pick(self, facts: Facts, candidates: Sequence[C]) -> C: ...


def names() -> tuple[str, ...]:
    return _NAMES


def make(name: str) -> Policy:
    """A fresh policy object by name; its module is imported only now."""
    if name not in _NAMES:
        raise ConfigError("proxy.policy", f"{name!r} is not a policy", f"Known policies: {', '.join(_NAMES)}.")
    policy: Policy = importlib.import_module(f"pdserve.proxy.policies.{name}").Policy()
    return policy
