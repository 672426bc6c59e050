"""Classes of requests: what each may expect, and which one a request belongs to. Pure.

    --slo-class interactive:ttft=0.5,itl=0.05 --slo-class batch:ttft=30,priority=10

`ttft` is the target for the first token, `itl` for the time between tokens, both in seconds (0 or left out: none);
`priority` its place in line, lower is earlier, as in vLLM. A request belongs to the class of its API key; else to the one
that its header x-pdserve-class names; else, if it carries a `priority` of its own, to the one with the highest priority
number that is not above it; else to `default`, which has --slo-ttft and --slo-itl as its targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pdserve.errors import ConfigError, RequestError
from pdserve.proxy.keys import Key

HEADER = b"x-pdserve-class"
DEFAULT = "default"
MOST = 16  # classes; their names are labels of metrics


@dataclass(frozen=True, slots=True)
class SloClass:
    name: str = DEFAULT
    ttft: float = 0.0
    itl: float = 0.0
    priority: int = 0

    @property
    def targets(self) -> bool:
        return bool(self.ttft or self.itl)


class Classes:
    def __init__(self, classes: Iterable[SloClass] = (), default: SloClass | None = None) -> None:
        self._default = default or SloClass()
        self.by_name = {known.name: known for known in (self._default, *classes)}

    def of(self, key: Key, headers: Sequence[tuple[bytes, bytes]], priority: int | None) -> SloClass:
        """Raises RequestError for a class that there is not."""
        found = self._named(key, headers) or self._by_priority(priority) or self._default
        return replace(found, ttft=key.ttft) if key.ttft else found

    def _named(self, key: Key, headers: Sequence[tuple[bytes, bytes]]) -> SloClass | None:
        if key.slo and (known := self.by_name.get(key.slo)):
            return known
        if len(self.by_name) == 1:
            return None
        name = next((value.decode("latin-1") for at, value in headers if at == HEADER), "")
        if name and name not in self.by_name:
            text = f"There is no class {name[:64]!r}. Known: {', '.join(self.by_name)}."
            raise RequestError(400, text, code="unknown_class")
        return self.by_name.get(name)

    def _by_priority(self, priority: int | None) -> SloClass | None:
        if priority is None or len(self.by_name) == 1:
            return None
        fitting = [known for known in self.by_name.values() if known.priority <= priority]
        return max(fitting, key=lambda known: known.priority, default=None)


def parsed(texts: Sequence[str], default: SloClass) -> Classes:
    """Of the command line. Raises ConfigError."""
    made: list[SloClass] = []
    for text in texts:
        name, _, given = text.partition(":")
        if not name or not name.replace("-", "").replace("_", "").isalnum() or name in {DEFAULT, *(m.name for m in made)}:
            fix = "Give each class a name of its own, of letters, digits, - and _."
            raise ConfigError("--slo-class", f"{name!r} cannot name a class", fix)
        numbers = _numbers(text, given)
        made.append(SloClass(name, numbers["ttft"], numbers["itl"], int(numbers["priority"])))
    if len(made) > MOST:
        raise ConfigError("--slo-class", f"{len(made)} classes are too many", f"Up to {MOST} can be told apart.")
    return Classes(made, default)


def _numbers(text: str, given: str) -> dict[str, float]:
    numbers = {"ttft": 0.0, "itl": 0.0, "priority": 0.0}
    for word in filter(None, given.split(",")):
        name, _, value = word.partition("=")
        try:
            number = int(value) if name == "priority" else float(value)
        except ValueError:
            number = -1.0
        if name not in numbers or not math.isfinite(number) or (number < 0 and name != "priority"):
            fix = "Write it like interactive:ttft=0.5,itl=0.05,priority=0."
            raise ConfigError("--slo-class", f"{word!r} in {text!r} is not understood", fix)
        numbers[name] = number
    return numbers
