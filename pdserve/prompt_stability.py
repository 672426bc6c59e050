"""What breaks the reuse of a prompt's KV from one request to the next: a reading of the prompts themselves. Pure.

A cache can give back what two prompts have in common from their first byte on, and nothing behind the first difference.
So a clock in a system prompt, tools whose JSON is written in another order, or a space more at the end of a line cost
all that follows. `analyse` compares each request of a JSONL file with the earlier one that it most resembles (of its own
session, if it names one) and says where the two part, why, and what the difference costs.

A line is a request body as a client sends it: `messages` (with `tools`) or `prompt`. Spaces between JSON tokens do not
matter, since engines parse the body; the order of keys does, since chat templates write tools as they come.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pdserve.errors import ConfigError

SESSIONS, REMEMBERED = 1000, 32  # sessions, and requests of each, that a new one is compared with
RESEMBLES = 200  # characters that two requests must have in common, differences of no meaning aside
CHARS_PER_TOKEN = 4.0  # where no tokenizer counts
AROUND = 30  # characters shown on either side of a parting

_TIME = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?|\d{1,2}:\d\d(?::\d\d)?(?: ?[AaPp][Mm])?"
    r"|\b\d{1,2}[./]\d{1,2}[./]\d{2,4}\b|\b1[5-9]\d{8}(?:\d{3})?\b"
    r"|\b(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?\b"
    r"|\b(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)[a-z]*\.? \d{1,2}(?:, \d{4})?"
)
_ID = re.compile(
    r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}|\b(?=\w*\d)[0-9a-zA-Z_]{12,}\b"
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SPACE = re.compile(r"\s+")

_FIXES = {
    "timestamp": "Put the time behind what stays the same (into the last user message), or round it to the day.",
    "identifier": "Leave the id out of the prompt, or put it behind what stays the same.",
    "number": "Put what counts up behind what stays the same.",
    "whitespace": "Build the text in one way: strip line ends, use one kind of line break, do not re-wrap.",
    "reordered-json": "Write JSON with its keys always in one order (json.dumps(..., sort_keys=True)).",
    "reordered-tools": "Send the tools always in one order, for instance by name.",
    "history-cut": "Cut long histories rarely and by a lot (say by half), not a message at every turn.",
    "history-changed": "Send earlier turns back as they were: append, do not rewrite.",
    "salt": "Use one cache_salt for all that may share: one for each tenant, not one for each request.",
    "model": "Requests to different models (or adapters) share nothing.",
}


class Piece(NamedTuple):
    """A part of a prompt, and where in the body it is from."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Two requests that could have shared more than they do."""

    line: int
    earlier: int  # the line that it was compared with
    kind: str  # one of _FIXES
    path: str  # of the part of the body where they part: messages[0].content
    offset: int  # characters into that part
    shared_tokens: int  # what can be reused as it is
    lost_tokens: int  # what could be reused too if it were not for this difference
    was: str  # the text around the parting, in the earlier request and in this one
    now: str
    estimated: bool = True  # tokens were guessed from characters

    @property
    def fix(self) -> str:
        return _FIXES[self.kind]

    def __str__(self) -> str:
        about = "about " if self.estimated else ""
        return (
            f"line {self.line}: parts from line {self.earlier} in {self.path} at character {self.offset} "
            f"({self.kind}): {about}{self.lost_tokens} tokens more could be reused, {about}{self.shared_tokens} are"
        )


@dataclass
class Prompt:
    line: int
    session: str
    pieces: list[Piece]
    model: str = ""
    salt: str = ""
    tools: str = ""  # all of them, in an order of their own, to tell "other tools" from "another order"

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass
class _Seen:
    by_session: OrderedDict[str, deque[Prompt]] = field(default_factory=OrderedDict)

    def of(self, session: str) -> deque[Prompt]:
        found = self.by_session.setdefault(session, deque(maxlen=REMEMBERED))
        self.by_session.move_to_end(session)
        if len(self.by_session) > SESSIONS:
            self.by_session.popitem(last=False)
        return found


def analyse(path: str | Path, tokenizer: Callable[[str], Iterable[Any]] | None = None) -> list[Finding]:
    """The findings over a JSONL file, in its order. `tokenizer` turns a text into tokens. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as lines:
            return list(compared(read(lines, str(path)), tokenizer))
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError("--prompts", f"cannot read {path} ({exc})", "Give a file with one request a line.") from exc


def read(lines: Iterable[str], source: str) -> Iterator[Prompt]:
    """Raises ConfigError with file and line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise ConfigError(f"{source}:{number}", f"not JSON ({exc})", "Each line is one request body.") from exc
        if isinstance(body, dict) and isinstance(body.get("body"), dict):
            body = body["body"]  # a line of OpenAI's batch format
        if not isinstance(body, dict) or not ({"messages", "prompt"} & body.keys()):
            raise ConfigError(f"{source}:{number}", "neither messages nor prompt", "Each line is one request body.")
        yield prompt_of(body, number)


def prompt_of(body: dict[str, Any], line: int) -> Prompt:
    pieces, tools = [], body.get("tools")
    if isinstance(tools, list):
        pieces = [Piece(f"tools[{n}]", _json(tool)) for n, tool in enumerate(tools)]
    if isinstance(system := body.get("system"), str | list):  # Anthropic's
        pieces += _content("system", system)
    for n, message in enumerate(_listed(body.get("messages"))):
        if isinstance(message, dict):
            pieces.append(Piece(f"messages[{n}].role", f"\n<{message.get('role')}>\n"))
            for key, value in message.items():
                if key != "role":
                    pieces += _content(f"messages[{n}].{key}", value)
    if "prompt" in body:
        pieces += _content("prompt", body["prompt"])
    session = next((str(body[key]) for key in ("session_id", "user") if body.get(key)), "")
    sorted_tools = "".join(sorted(json.dumps(tool, sort_keys=True) for tool in _listed(tools)))
    return Prompt(line, session, pieces, str(body.get("model", "")), str(body.get("cache_salt", "")), sorted_tools)


def compared(prompts: Iterable[Prompt], tokenizer: Callable[[str], Iterable[Any]] | None = None) -> Iterator[Finding]:
    seen = _Seen()
    for prompt in prompts:
        earlier = seen.of(prompt.session)
        other = _most_alike(prompt, earlier)
        if other is not None and (finding := parting(other, prompt, tokenizer)) is not None:
            yield finding
        earlier.append(prompt)


def parting(old: Prompt, new: Prompt, tokenizer: Callable[[str], Iterable[Any]] | None = None) -> Finding | None:
    """Where and why `new` parts from `old`; None if it goes on from it or has another end, as it should."""
    a, b = old.text, new.text
    same = _common(a, b)
    kind, until = _reason(old, new, same)
    if not kind:
        return None
    if kind in ("salt", "model"):
        same = 0
    path, offset = _place(new, same)
    count = (
        (lambda text: len(list(tokenizer(text)))) if tokenizer else (lambda text: round(len(text) / CHARS_PER_TOKEN))
    )
    shared, lost = count(b[:same]), count(b[same:until])
    if not lost:
        return None
    return Finding(
        new.line, old.line, kind, path, offset, shared, lost, _around(a, same), _around(b, same), tokenizer is None
    )


def _reason(old: Prompt, new: Prompt, same: int) -> tuple[str, int]:
    """The kind of a parting behind `same` characters, and up to where `new` could have been reused; "" if all is well."""
    a, b = old.text, new.text
    could = _meant(old, new)
    for name, x, y in (("model", old.model, new.model), ("salt", old.salt, new.salt)):
        if x != y and could >= RESEMBLES:
            return name, could
    if same >= len(a):
        return "", same
    if old.tools == new.tools and _place(new, same)[0].startswith("tools["):
        names = [{p.text for p in prompt.pieces if p.path.startswith("tools[")} for prompt in (old, new)]
        return ("reordered-tools" if names[0] == names[1] else "reordered-json"), max(could, _end_of_tools(new))
    if could > same + 8:
        return _volatile(a, b, same), could
    if new.session and len(new.pieces) > 1 and not _is_last(new, same):
        return _history(old, new, same)
    return "", same


def _is_last(prompt: Prompt, at: int) -> bool:
    """Whether this place is in the last message, which may be what it likes."""
    last = prompt.pieces[-1].path.partition(".")[0]
    return _place(prompt, at)[0].partition(".")[0] == last


def _history(old: Prompt, new: Prompt, same: int) -> tuple[str, int]:
    """Within a session the earlier prompt should be how the next one begins."""
    a, b = old.text, new.text
    rest = a[same:]
    tail = rest[-min(len(rest), 4 * RESEMBLES) :]
    at = b.find(tail, same)
    if at >= 0:  # what came later in the old one is in the new one, further to the front
        return "history-cut", at + len(tail)
    return "history-changed", min(len(b), len(a))


def _volatile(a: str, b: str, same: int) -> str:
    """Which difference without meaning it is."""
    if _is_space(a, b, same):
        return "whitespace"
    for kind, pattern in (("timestamp", _TIME), ("identifier", _ID), ("number", _NUMBER)):
        if _spans(pattern, a, same) and _spans(pattern, b, same):
            return kind
    return "reordered-json"  # the one thing left that _plain does away with


def _is_space(a: str, b: str, at: int) -> bool:
    around = slice(max(0, at - 1), at + 1)
    x, y = a[around], b[around]
    if not (any(c.isspace() for c in x) or any(c.isspace() for c in y)):
        return False
    return _SPACE.sub("", a[at : at + 80])[:20] == _SPACE.sub("", b[at : at + 80])[:20]


def _spans(pattern: re.Pattern[str], text: str, at: int) -> bool:
    begin = max(0, at - 40)
    return any(m.start() + begin <= at < m.end() + begin + 1 for m in pattern.finditer(text[begin : at + 40]))


def _meant(old: Prompt, new: Prompt) -> int:
    """How far into `new` the two are the same, differences of no meaning aside."""
    at = 0
    for x, y in zip(old.pieces, new.pieces, strict=False):
        if x.text == y.text:
            at += len(y.text)
            continue
        if x.path == y.path and _plain(x.text) == _plain(y.text):
            at += len(y.text)
            continue
        return at + _meant_within(x.text, y.text)
    return at


def _meant_within(x: str, y: str) -> int:
    """As _meant, for two texts of which one may go on differently: by lines, then by characters."""
    at = 0
    old, new = x.splitlines(keepends=True), y.splitlines(keepends=True)
    for p, q in zip(old, new, strict=False):
        if _plain(p) != _plain(q):
            return at + _common(p, q)
        at += len(q)
    return at


def _plain(text: str) -> str:
    """A text without what may differ without meaning anything."""
    try:
        parsed = json.loads(text) if text[:1] in "{[" else None
    except (ValueError, RecursionError):
        parsed = None
    if parsed is not None:
        text = json.dumps(parsed, sort_keys=True)
    for pattern, word in ((_TIME, "<time>"), (_ID, "<id>"), (_NUMBER, "0"), (_SPACE, " ")):
        text = pattern.sub(word, text)
    return text.strip()


def _most_alike(prompt: Prompt, earlier: Iterable[Prompt]) -> Prompt | None:
    """The latest of those that have most in common with it, if that is enough to speak of."""
    best, most = None, 0
    for other in earlier:
        alike = max(
            _common(other.text, prompt.text),
            _meant(other, prompt),
            _end_of_tools(prompt) * (other.tools == prompt.tools),
        )
        if alike >= most:
            best, most = other, alike
    return best if most >= min(RESEMBLES, len(prompt.text) // 2) else None


def _end_of_tools(prompt: Prompt) -> int:
    return sum(len(piece.text) for piece in prompt.pieces if piece.path.startswith("tools["))


def _common(a: str, b: str) -> int:
    """Characters that two texts have in common from the first on."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # halving, so that long texts are compared in C
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _place(prompt: Prompt, at: int) -> tuple[str, int]:
    for piece in prompt.pieces:
        if at < len(piece.text):
            return piece.path, at
        at -= len(piece.text)
    return (prompt.pieces[-1].path if prompt.pieces else "prompt"), at


def _around(text: str, at: int) -> str:
    return text[max(0, at - AROUND) : at + AROUND]


def _content(path: str, value: Any) -> list[Piece]:
    if isinstance(value, str):
        return [Piece(path, value)]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return [piece for n, part in enumerate(value) for piece in _part(f"{path}[{n}]", part)]
    return [] if value is None else [Piece(path, _json(value))]


def _part(path: str, part: dict[str, Any]) -> list[Piece]:
    if isinstance(text := part.get("text"), str):
        return [Piece(f"{path}.text", text)]
    return [Piece(path, _json({key: value for key, value in part.items() if key != "cache_control"}))]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
