"""A JSON object as the client wrote it, whose top-level fields can be changed without touching any other byte.

An edit never decodes and re-encodes a field that it does not change: whitespace, key order, number spelling and string
escapes of the rest stay as they came. The object is checked in full (by msgspec, in C), then its members are located;
the values' lengths are known from that check, so a prompt of a megabyte is compared once and never walked in Python.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Set
from typing import Any, NamedTuple

import msgspec

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_SCALAR = re.compile(rb"[^,}\] \t\n\r]+")
_MEMBER = re.compile(rb'[ \t\n\r]*,?[ \t\n\r]*("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\n\r]*:[ \t\n\r]*')
_NESTING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]')
_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_KINDS = {b"[": "an array", b'"': "a string", b"t": "a boolean", b"f": "a boolean", b"n": "null"}


class Member(NamedTuple):
    """Where one member is: raw[key:value] is the key with its colon, raw[value:end] the value."""

    name: str
    key: int
    value: int
    end: int


class Body:
    """A parsed body. Where a name occurs twice its last value counts, as in every JSON reader the engines use."""

    __slots__ = ("_members", "_values", "raw")

    def __init__(self, raw: bytes) -> None:
        """Raises ValueError with a sentence for the client if `raw` is not a JSON object."""
        self.raw = raw
        self._values = _decode(raw)
        self._members: list[Member] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> Set[str]:
        return self._values.keys()

    def raw_value(self, name: str) -> bytes | None:
        """The value as written, or None if there is no such field."""
        value = self._values.get(name)
        return None if value is None else bytes(value)

    def size(self, name: str) -> int:
        """How many bytes the value has as written; 0 if there is no such field."""
        value = self._values.get(name)
        return 0 if value is None else len(memoryview(value))

    def get(self, name: str) -> Any:
        """The decoded value, or None if the field is absent, null, or of a spelling that cannot be decoded."""
        value = self._values.get(name)
        if value is None:
            return None
        try:
            return msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            return None

    def edited(self, changes: Mapping[str, bytes], remove: Collection[str] = ()) -> bytes:
        """The bytes with `changes` (name -> new JSON value) made in place or appended, and without `remove`."""
        members = self.members()
        if members and len(members) == len(self._values) and not any(name in self._values for name in remove):
            return self._replaced(members, changes, [name for name in changes if name not in self._values])
        last = {m.name: i for i, m in enumerate(members)}
        dropped = {i for i, m in enumerate(members) if m.name in remove or (m.name in changes and last[m.name] != i)}
        added = [name for name in changes if name not in last]
        if not dropped and members:
            return self._replaced(members, changes, added)
        kept = [i for i in range(len(members)) if i not in dropped]
        opening = self.raw.index(b"{") + 1
        # A dropped member takes the comma before it along, or the one after it if it was the first that would remain.
        out = [self.raw[:opening]]
        for n, i in enumerate(kept):
            lead = members[i - 1].end if i else opening
            gap = self.raw[lead : members[i].key]
            if n == 0:
                gap = gap.lstrip(b", \t\n\r") if i else gap
            m = members[i]
            out += [gap, self.raw[m.key : m.value], changes.get(m.name, self.raw[m.value : m.end])]
        for n, name in enumerate(added):
            out += [b", " if kept or n else b"", msgspec.json.encode(name), b": ", changes[name]]
        closing = members[-1].end if members else opening
        out.append(self.raw[closing:] if members else b"}" + self.raw[self.raw.rindex(b"}") + 1 :])
        return b"".join(out)

    def _replaced(self, members: list[Member], changes: Mapping[str, bytes], added: list[str]) -> bytes:
        """As edited, where nothing is taken out: all between the changed values stays in one piece."""
        raw, done = self.raw, 0
        out: list[bytes] = []
        for m in members:
            if m.name in changes:
                out += (raw[done : m.value], changes[m.name])
                done = m.end
        if added:
            end = members[-1].end
            out.append(raw[done:end])
            out += [b", %b: %b" % (msgspec.json.encode(name), changes[name]) for name in added]
            done = end
        return b"".join((*out, raw[done:])) if out else raw

    def members(self) -> list[Member]:
        """The members in order, located once. (Every one of them, repeated names included.)"""
        if self._members is None:
            self._members = list(self._locate())
        return self._members

    def _locate(self) -> list[Member]:
        raw, found = self.raw, []
        at = raw.index(b"{") + 1
        while key := _MEMBER.match(raw, at):  # the decoder accepted it: where there is no key the object ends
            written, value = key[1], key.end()
            name = msgspec.json.decode(written) if b"\\" in written else written[1:-1].decode()
            at = self._value_end(name, value)
            found.append(Member(name, key.start(1), value, at))
        return found

    def _value_end(self, name: str, start: int) -> int:
        """The decoder kept the last value of each name; if the bytes here are that value its length is already known.
        A number may be the beginning of a longer one, so what follows must end it."""
        known = self._values[name]
        end = start + len(memoryview(known))
        if self.raw[start:end] == bytes(known) and self.raw[end : end + 1] in b", \t\n\r}":
            return end
        return _scan_value(self.raw, start)


def _decode(raw: bytes) -> dict[str, msgspec.Raw]:
    try:
        if not raw.isascii():
            raw.decode("utf-8")
        return _decoder.decode(raw)
    except UnicodeDecodeError as exc:
        raise ValueError(f"The request body is not valid UTF-8 (byte {exc.start}).") from exc
    except RecursionError as exc:
        raise ValueError("The request body is nested too deeply.") from exc
    except msgspec.ValidationError as exc:
        kind = _KINDS.get(raw.lstrip()[:1], "a number")
        raise ValueError(f"The request body must be a JSON object, not {kind}.") from exc
    except msgspec.DecodeError as exc:
        reason = "it is empty" if not raw.strip() else str(exc)
        raise ValueError(f"The request body is not valid JSON: {reason}.") from exc


def _scan_value(raw: bytes, start: int) -> int:
    first = raw[start : start + 1]
    if first == b'"':
        string = _STRING.match(raw, start)
        assert string is not None, "the decoder accepted it"
        return string.end()
    if first not in b"[{":
        scalar = _SCALAR.match(raw, start)
        assert scalar is not None, "the decoder accepted it"
        return scalar.end()
    depth = 0
    for token in _NESTING.finditer(raw, start):
        if token.group() in b"[{":
            depth += 1
        elif token.group() in b"]}":
            depth -= 1
            if depth == 0:
                return token.end()
    raise AssertionError("the decoder accepted it, so it closes")
