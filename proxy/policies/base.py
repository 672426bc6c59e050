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

_NAMES = ("round_robin", "least_load", "power_of_two", "session", "prefix", "chunk_location")


class Candidate(Protocol):
    """What a policy may know of an instance."""

    @property
    def name(self) -> str: ...

    @property
    def in_flight(self) -> int:
        """Requests that this proxy has running on it now."""

    @property
    def load(self) -> int:
        """Requests running or waiting there, those of other proxies included as far as the engine has told."""

    @property
    def host(self) -> str:
        """The machine it runs on, and with it the cache that it shares with others there."""


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a policy may know of a request."""

    endpoint: str
    prompt_bytes: int = 0
    session: str = ""  # whose conversation this is
    # A hash for each beginning of the prompt, in steps of BLOCK bytes; facts.py makes them.
    blocks: tuple[int, ...] = ()
    request: str = ""  # its id


class Policy(Protocol):
    def pick(self, facts: Facts, candidates: Sequence[C]) -> C: ...

    def learn(self, facts: Facts, candidate: Candidate, cached: int | None) -> None:
        """What an engine's reply told: it has this prompt now, and `cached` tokens of it had been there before (None:
        not told). A policy that learns nothing does nothing."""


    def located(self, facts: Facts, host: str, blocks: int) -> None:
        """The cache of that host has the prompt's first `blocks` blocks, and no more of it."""

    def forget(self, name: str = "", host: str = "") -> None:
        """That engine, or the cache of that host, has begun a new life: what it had is gone."""


class Unlearning:
    """For policies whose choice does not depend on what engines reply."""

    def learn(self, facts: Facts, candidate: Candidate, cached: int | None) -> None:
        pass

    def located(self, facts: Facts, host: str, blocks: int) -> None:
        pass

    def forget(self, name: str = "", host: str = "") -> None:
        pass


def idlest(candidates: Sequence[C]) -> C:
    """The first of the least loaded."""
    return min(candidates, key=lambda candidate: candidate.load)


def names() -> tuple[str, ...]:
    return _NAMES


def make(name: str) -> Policy:
    """A fresh policy object by name; its module is imported only now."""
    if name not in _NAMES:
        raise ConfigError("proxy.policy", f"{name!r} is not a policy", f"Known policies: {', '.join(_NAMES)}.")
    policy: Policy = importlib.import_module(f"pdserve.proxy.policies.{name}").Policy()
    return policy
