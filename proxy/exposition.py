"""Prometheus' text format: read quickly, and joined from several engines under an `instance` label. Pure.

Reading is by two expressions over bytes: the client library's own parser needs a hundred times longer, on the loop that
answers tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

_SAMPLE = re.compile(rb"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ \n]+)", re.MULTILINE)
_LABEL = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(rb"\\(.)")
_META = re.compile(rb"^# (?:HELP|TYPE) ([^ \n]+)")
_INSTANCE = re.compile(rb'(^|,)instance="')
#: what of an engine's page is passed on: the rest describes Python's garbage collector and the HTTP server
PASSED_ON = (b"vllm:", b"pdserve_", b"process_")
_SUFFIXES = (b"_total", b"_bucket", b"_count", b"_sum", b"_created")

Labels = tuple[tuple[str, str], ...]


class Samples:
    """The values of one page, by name."""

    def __init__(self, found: Mapping[str, list[tuple[dict[str, str], float]]] | None = None) -> None:
        self._found = found or {}

    def of(self, name: str) -> list[tuple[dict[str, str], float]]:
        return self._found.get(name, [])

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all series with these labels; None where there is no series of this name at all."""
        if name not in self._found:
            return None
        return sum(value for has, value in self.of(name) if labels.items() <= has.items())

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums for each value of one label."""
        sums: dict[str, float] = {}
        for has, value in self.of(name):
            if label in has and labels.items() <= has.items():
                sums[has[label]] = sums.get(has[label], 0.0) + value
        return sums


def read(page: bytes, names: frozenset[str]) -> Samples:
    """The series of these names. What cannot be read is left out."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for raw_name, labels, raw_value in _SAMPLE.findall(page):
        name = raw_name.decode()
        if name not in names:
            continue
        try:
            value = float(raw_value)
        except ValueError:
            continue
        if value == value:  # not NaN
            has = {key.decode(): _plain(text) for key, text in _LABEL.findall(labels)}
            found.setdefault(name, []).append((has, value))
    return Samples(found)


def _plain(text: bytes) -> str:
    if b"\\" in text:
        text = _ESCAPE.sub(lambda m: b"\n" if m[1] == b"n" else m[1], text)
    return text.decode(errors="replace")


def joined(pages: Iterable[tuple[str, bytes]]) -> bytes:
    """One page of several engines': each family once, its series with `instance`. A label of that name which an engine
    itself gave becomes `exported_instance`, as Prometheus does it."""
    heads: dict[bytes, list[bytes]] = {}
    series: dict[bytes, list[bytes]] = {}
    for instance, page in pages:
        label = b'instance="%b"' % instance.replace("\\", r"\\").replace('"', r"\"").encode()
        for family, line in _lines(page):
            if line.startswith(b"#"):
                kept = heads.setdefault(family, [])
                if not any(other.split(b" ", 2)[1] == line.split(b" ", 2)[1] for other in kept):
                    kept.append(line)
            elif (placed := _placed(line, label)) is not None:
                series.setdefault(family, []).append(placed)
    out = [line for family, lines in series.items() for line in (*heads.get(family, ()), *lines)]
    return b"\n".join(out) + b"\n" if out else b""


def _lines(page: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The lines that are passed on, each with its family: the one that was announced last, if the name fits it."""
    family = b""
    for line in page.splitlines():
        if meta := _META.match(line):
            family = meta[1]
        elif not (sample := _SAMPLE.match(line)):
            continue
        elif not (sample[1] == family or any(sample[1] == family + suffix for suffix in _SUFFIXES)):
            family = sample[1]
        if family.startswith(PASSED_ON):
            yield family, line


def _placed(line: bytes, label: bytes) -> bytes | None:
    found = _SAMPLE.match(line)
    if found is None:
        return None
    own = _INSTANCE.sub(rb'\1exported_instance="', found[2] or b"").rstrip(b",")
    return b"%b{%b} %b" % (found[1], label + b"," + own if own else label, found[3])
