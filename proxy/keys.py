"""The proxy's own API keys: who may ask, how much at once and how often. Only hashes are ever held.

A file has one key a line: a name, the SHA-256 of the key in hex, and what differs from the defaults:

    # printf %s "$KEY" | sha256sum
    alice  9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  streams=8 per_minute=600 weight=2
    batch  60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752  priority=10 class=batch

The same lines, or several with ";" in between, may be in the environment (PDSERVE_API_KEYS): hashes there too, so that
whoever reads the environment of a process does not hold keys. File and environment add up.

A client sends its key as `X-Pdserve-Key`, or as a bearer token where the engines want none of their own. A bearer token
that is one of ours is not passed on; any other Authorization is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pdserve.errors import ConfigError, RequestError
from pdserve.proxy.shared import Alone, Shared

HEADER = b"x-pdserve-key"
ANYBODY = "anybody"
Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Key:
    """`streams` requests at once, `per_minute` in a minute (0: no limit); `weight` is its share when others wait too,
    `priority` its place in line (lower is earlier, as in vLLM), `ttft` its own target for the first token, `slo` the
    class that its requests belong to (slo.py)."""

    name: str
    streams: int = 0
    per_minute: int = 0
    weight: float = 1.0
    priority: int = 0
    ttft: float = 0.0
    slo: str = ""
    running: int = 0
    tokens: float = 0.0
    filled: float = 0.0

    def take(self, now: float, elsewhere: int = 0) -> None:
        """Counts a request in; `elsewhere` run in other workers. Raises RequestError 429."""
        if self.streams and self.running + elsewhere >= self.streams:
            text = f"The key {self.name!r} has {self.running + elsewhere} requests running, which is its limit."
            raise RequestError(429, text, "rate_limit_error", code="too_many_streams")
        if self.per_minute:
            room = max(1.0, self.per_minute / 10)  # what may come at once
            gained = (now - self.filled) * self.per_minute / 60 if self.filled else room
            self.tokens, self.filled = min(room, self.tokens + gained), now
            if self.tokens < 1:
                text = f"The key {self.name!r} may ask {self.per_minute} times a minute."
                raise RequestError(429, text, "rate_limit_error", code="rate_limit_exceeded")
            self.tokens -= 1
        self.running += 1


@dataclass
class Keys:
    """All keys. Without any, everybody is let in, under one name and without limits."""

    by_hash: dict[str, Key] = field(default_factory=dict)
    anybody: Key = field(default_factory=lambda: Key(ANYBODY))
    shared: Shared = field(default_factory=Alone)

    def take(self, key: Key) -> None:
        """Counts a request of this key in. Raises RequestError 429. The other workers are told where there is a limit."""
        if not key.streams:
            return key.take(time.monotonic())
        name = f"key {key.name}"
        key.take(time.monotonic(), self.shared.others(name))
        self.shared.add(name, 1)

    def give_back(self, key: Key) -> None:
        key.running -= 1
        if key.streams:
            self.shared.add(f"key {key.name}", -1)

    def admit(self, headers: Headers) -> tuple[Key, Headers]:
        """Whose request it is, and the headers without our key. Raises RequestError 401."""
        if not self.by_hash:
            return self.anybody, headers
        given = next((value for name, value in headers if name == HEADER), None)
        if given is not None:
            return self._known(given), [pair for pair in headers if pair[0] != HEADER]
        bearer = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, token = bearer.partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            text = "No API key was given. Send it as X-Pdserve-Key or as a bearer token."
            raise RequestError(401, text, "authentication_error", code="missing_api_key")
        return self._known(token.strip()), [pair for pair in headers if pair[0] != b"authorization"]

    def _known(self, given: bytes) -> Key:
        key = self.by_hash.get(hashed(given))
        if key is None:
            raise RequestError(401, "The API key is not known.", "authentication_error", code="invalid_api_key")
        return key


def hashed(key: bytes) -> str:
    return sha256(key).hexdigest()


def read(path: str, environment: str = "") -> Keys:
    """The keys of a file, those of the environment, or both. Raises ConfigError with file and line."""
    keys = Keys()
    if path:
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError("--api-keys", f"cannot read {path} ({exc})", "Give a file with one key a line.") from exc
        parsed(lines, path, keys)
    parsed(environment.replace(";", "\n").splitlines(), "PDSERVE_API_KEYS", keys)
    if (path or environment.strip()) and not keys.by_hash:
        raise ConfigError(path or "PDSERVE_API_KEYS", "there is no key in it", "Write a name and a hash on a line.")
    return keys


def parsed(lines: Iterable[str], source: str, keys: Keys | None = None) -> Keys:
    keys = keys or Keys()
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"{source}:{number}"
        if len(words) < 2 or len(words[1]) != 64 or not set(words[1].lower()) <= set("0123456789abcdef"):
            fix = 'printf %s "$KEY" | sha256sum makes the hash.'
            raise ConfigError(where, "a line is a name and the SHA-256 of a key in hex", fix)
        key = Key(words[0])
        for word in words[2:]:
            _set(key, word, where)
        if words[1].lower() in keys.by_hash:
            raise ConfigError(where, "this key is there twice", "Remove one of the lines.")
        keys.by_hash[words[1].lower()] = key
    return keys


def _set(key: Key, word: str, where: str) -> None:
    name, _, value = word.partition("=")
    if name == "class" and value:
        key.slo = value
        return
    kinds = {"streams": int, "per_minute": int, "weight": float, "priority": int, "ttft": float}
    if name not in kinds:
        raise ConfigError(where, f"{name!r} is not known", f"Known: {', '.join(kinds)}, class.")
    try:
        number = kinds[name](value)
    except ValueError as exc:
        raise ConfigError(where, f"{word!r} is not a number", f"Write it like {name}=8.") from exc
    if not math.isfinite(number) or (number < 0 and name != "priority") or (name == "weight" and number == 0):
        raise ConfigError(where, f"{word!r} is out of range", "Give a positive number.")
    setattr(key, name, number)
