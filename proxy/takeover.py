"""Carrying a stream on after its engine died: what is remembered of each stream, and how the next engine is asked.

    nothing given yet       the request is sent once more, as it was                              "repeat"
    all given but the end   the proxy says it                                                     "end"
    plain text              the next engine goes on behind the tokens so far                      "resume"
    anything else           where the same request gives the same answer (temperature 0, or a
                            seed), it is sent once more and what was given is left out            "repeat"
                            where it does not, the client is told that the stream broke off       -

Which requests are plain text is the dialect's to say (engines/vllm/resume.py lists why one is not). What is repeated is
checked against what was given: an engine that answers differently is not passed on.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.engines.base import Dialect
from pdserve.engines.body import Body
from pdserve.proxy.given import Given, Mark
from pdserve.proxy.seam import DONE, Replay, Resume, Seam, encoded

LIVES = 3  # engines that may go on with one stream after the first


@dataclass(frozen=True, slots=True)
class Plan:
    """How to go on: a request to another engine and the seam for its answer; or, without a body, the last bytes."""

    how: str
    path: bytes | None = None  # None: the client's own
    body: bytes = b""
    seam: Seam | None = None
    last: bytes = b""


class Takeover:
    """One stream's. `edit` takes every whole event on its way to the client; `plan` is asked when an engine has died."""

    def __init__(self, dialect: Dialect, endpoint: str, body: Body, chat: bool, keep: bool) -> None:
        self._dialect, self._endpoint, self._body, self._chat = dialect, endpoint, body, chat
        self.keep = keep  # there may be another engine, so that remembering has a point
        self.ask_ids = keep and dialect.resumable(endpoint, body)
        self._hide = self.ask_ids and body.get("return_token_ids") is not True
        self.sent = b""  # the body of the decode leg
        self.cached: int | None = None
        self.given = Given()
        self.lives = LIVES
        self.error = b""  # the error with which the engine itself ended the stream
        self._seam: Seam | None = None

    def edit(self, data: bytes) -> bytes:
        """From the engine's events to the client's. Raises Diverged or Foreign."""
        if self.keep:
            if (at := data.find(b'data: {"error"')) >= 0 and data[at - 1 : at] in (b"", b"\n"):
                self.error, data = data[at:], data[:at]
            if self._seam is not None:
                data = self._seam.feed(data)
            self.given.add(data)
            if self._hide:
                data = self._dialect.hide_ids(data)
        return data if self.cached is None else self._dialect.tell_cached(data, self.cached)

    def plan(self) -> Plan | None:
        """None: it cannot go on."""
        given = self.given
        given.fold()
        self.error, self._seam = b"", None
        if not self.keep or given.foreign or self.lives <= 0:
            return None
        self.lives -= 1
        if given.nothing(ids=not self._hide):
            given.restart()
            return self._with(Plan("repeat", None, self.sent, Replay(given)))
        plan = self._ended() or self._resumed()
        if plan is None and self._dialect.repeatable(self._body):
            plan = Plan("repeat", None, self.sent, Replay(given))
        return self._with(plan) if plan else None

    def _with(self, plan: Plan) -> Plan:
        self._seam = plan.seam
        return plan

    def _ended(self) -> Plan | None:
        given, wanted = self.given, self._body.get("n")
        if len(given.finished) < (wanted if isinstance(wanted, int) else 1):
            return None
        options = self._body.get("stream_options")
        if given.usage or not isinstance(options, dict) or options.get("include_usage") is not True:
            return Plan("end", last=DONE)
        if not (self.ask_ids and given.ids and given.prompt_ids):
            return None
        prompt, out = given.prompt_ids.count(b",") + 1, len(given.ids)
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + out, "completion_tokens": out}
        details = {"prompt_tokens_details": {"cached_tokens": self.cached}} if self.cached is not None else {}
        return Plan("end", last=encoded({**given.head, "choices": [], "usage": usage | details}) + DONE)

    def _resumed(self) -> Plan | None:
        given = self.given
        if not (self.ask_ids and given.plain and given.prompt_ids and not given.finished):
            return None
        greedy, held = self._dialect.greedy(self._body), self._dialect.held_back(self._body)
        if greedy and self._dialect.counts_apart(self._body):
            return None  # repeating is exact, resuming is not
        mark = self._place(held, exactly=not greedy)
        if mark is None:
            return None
        ahead = len(given.text) - mark.chars - held
        given.rewind(mark)
        body = self._dialect.resume_body(self._endpoint, self._body, given.prompt_ids, given.ids)
        seam = Resume(given, mark, ahead, self._chat)
        return Plan("resume", self._dialect.RESUME_PATH.encode(), body, seam)

    def _place(self, held: int, exactly: bool) -> Mark | None:
        """The last mark whose tokens' text has been given in full. What lies behind it will be generated again, which
        gives the same text only without chance: with chance, no text may lie behind it."""
        for mark in reversed(self.given.marks):
            if mark.chars + held <= len(self.given.text):
                return mark if not exactly or mark.chars + held == len(self.given.text) else None
        return None
