"""Carrying a stream on after its engine died: what is remembered of each stream, and how the next engine is asked.

    nothing given yet       the request is sent once more, as it was                              "repeat"
    all given but the end   the proxy says it                                                     "end"
    plain text              the next engine goes on behind the tokens so far                      "resume"
    plain text without      /v1/responses and /v1/messages do not tell token ids: another engine
    ids, sampled            is asked which the prompt's are, and cuts the text so far into tokens    "resume"
    anything else           where the same request gives the same answer (temperature 0, or a
                            seed), it is sent once more and what was given is left out            "repeat"
                            where it does not, the client is told that the stream broke off       -

Which requests are plain text is the dialect's to say (engines/vllm/resume.py lists why one is not). What is repeated is
checked against what was given: an engine that answers differently is not passed on.

A stream may also begin with the producer's own first token (begin): the consumer's answer, which began before it could know
of that token, goes on behind it (behind.py), and where it would begin otherwise it is asked anew, as for plain text.

Where chance is involved, what was generated must not be generated again, as it would become something else. With stop
strings that is more than the client has: an engine keeps back the characters in which one may have begun. Their tokens
are known, so an engine is asked what they say ("questions"), and stop strings are looked for here from then on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pdserve.engines.base import Dialect, First
from pdserve.engines.body import Body
from pdserve.proxy import onward, openai
from pdserve.proxy.behind import Behind
from pdserve.proxy.given import Given, Mark
from pdserve.proxy.kept import Kept
from pdserve.proxy.onward import Onward
from pdserve.proxy.seam import DONE, Replay, Resume, Seam, encoded
from pdserve.proxy.stops import Stops
from pdserve.proxy.typed import Again, Told
from pdserve.proxy.typed import encoded as typed_encoded

LIVES = 3  # engines that may go on with one stream after the first
Question = tuple[bytes, bytes]  # a path and a body


@dataclass(frozen=True, slots=True)
class Plan:
    """How to go on: a request to another engine and the seam for its answer; or, without a body, the last bytes; or
    questions whose answers are wanted first (Takeover.answered)."""

    how: str
    path: bytes | None = None  # None: the client's own
    body: bytes = b""
    seam: Seam | None = None
    last: bytes = b""
    questions: tuple[Question, ...] = ()


class Takeover:
    """One stream's. `edit` takes every whole event on its way to the client; `plan` is asked when an engine has died."""

    error_begins = b'data: {"error"'
    ask_ids = False
    _hide = False

    def __init__(self, dialect: Dialect, endpoint: str, body: Body, keep: bool, kept: Kept) -> None:
        self._dialect, self._endpoint, self._body, self._kept = dialect, endpoint, body, kept
        self.keep = keep  # there may be another engine, so that remembering has a point
        self.sent = b""  # the body of the decode leg
        self.cached: int | None = None
        self.prompt: int | None = None  # tokens, as the producer counted them
        self.lives = LIVES
        self.error = b""  # the error with which the engine itself ended the stream
        self._seam: Seam | None = None

    @property
    def begun(self) -> bool:
        """The client has the producer's first token, and the consumer has said nothing of its own yet."""
        return isinstance(self._seam, Behind) and not self._seam.joined

    @property
    def over(self) -> bool:
        """The client has all of the answer, whatever the engine still says."""
        return self._seam is not None and self._seam.over

    def edit(self, data: bytes) -> bytes:
        """From the engine's events to the client's. Raises Diverged or Foreign."""
        if self.keep:
            if (at := data.find(self.error_begins)) >= 0 and data[at - 1 : at] in (b"", b"\n"):
                self.error, data = data[at:], data[:at]
            if self._seam is not None:
                data = self._seam.feed(data)
            if self.lives:
                self._kept.add(data)
            if self._hide:
                data = self._dialect.hide_ids(data)
        return data if self.cached is None else self._dialect.tell_cached(data, self.cached)

    def plan(self) -> Plan | None:
        """None: it cannot go on."""
        self.error, self._seam = b"", None
        self._kept.fold()
        if not self.keep or self._kept.foreign or self.lives <= 0:
            return None
        self.lives -= 1
        return self._with(self._plan())

    def answered(self, replies: Sequence[bytes]) -> Plan | None:
        """The plan after its questions."""
        return self._with(self._after(replies))

    @abstractmethod
    def _plan(self) -> Plan | None: ...

    def _after(self, replies: Sequence[bytes]) -> Plan | None:
        raise NotImplementedError("nothing was asked")

    def _with(self, plan: Plan | None) -> Plan | None:
        self._seam = plan.seam if plan is not None else None
        return plan


class OfChoices(Takeover):
    """/v1/completions and /v1/chat/completions."""

    def __init__(self, dialect: Dialect, endpoint: str, body: Body, keep: bool) -> None:
        self.given = Given()
        super().__init__(dialect, endpoint, body, keep, self.given)
        self._chat = endpoint == openai.CHAT
        self.ask_ids = keep and dialect.resumable(endpoint, body)
        self._hide = self.ask_ids and body.get("return_token_ids") is not True
        self._asked: tuple[Mark, ...] = ()
        self.first: First | None = None
        self._behind: Behind | None = None
        self._differed = False
        self.unfinished = False  # the engine is asked to go on behind a token that has no text of its own

    def begin(self, first: First) -> bytes:
        """The producer's first token begins the stream: events for the client."""
        self.first = first
        self.given.add(first.events)
        self.given.fold()
        self._seam = self._behind = Behind(self.given, first.token)
        data = self._dialect.hide_ids(first.events) if self._hide else first.events
        return data if self.cached is None else self._dialect.tell_cached(data, self.cached)

    @property
    def outcome(self) -> str:
        """Of the first token that was handed on."""
        if self.first is None or self.first.over:
            return "ended"
        return "differed" if self._differed else "confirmed" if self._behind and self._behind.joined else "unanswered"

    def differs(self) -> Plan:
        """The consumer would have begun otherwise: what it is asked instead, behind the token that the client has."""
        assert self.first is not None
        self._differed, self.error = True, b""
        words, kept, _ = self._dialect.stop_strings(self._body)
        stops = Stops(words, kept, 0, self.first.shown if kept else "", self.first.hidden) if words else None
        plan = self._from(Mark(1, len(self.first.shown)), 0, stops)
        self._seam, self.unfinished = plan.seam, not self.first.shown + self.first.hidden
        return plan

    def asks_text(self, ids: Sequence[int]) -> Question:
        """What do these tokens say behind the first one?"""
        assert self.first is not None
        return self._dialect.detokenize(self._body, [self.first.token, *ids])

    def _plan(self) -> Plan | None:
        given = self.given
        self.unfinished = False
        if self.first is not None and len(given.ids) < 2 and not given.finished:
            self._behind = Behind(given, self.first.token)
            return Plan("repeat", None, self.sent, self._behind)
        if given.nothing(ids=not self._hide):
            given.restart()
            return Plan("repeat", None, self.sent, Replay(given))
        plan = self._ended() or self._resumed()
        if plan is None and self._dialect.repeatable(self._endpoint, self._body):
            plan = Plan("repeat", None, self.sent, Replay(given))
        return plan

    def _ended(self) -> Plan | None:
        given, wanted = self.given, self._body.get("n")
        if len(given.finished) < (wanted if isinstance(wanted, int) else 1):
            return None
        if given.usage or not self._wants_usage:
            return Plan("end", last=DONE)
        if not (self.ask_ids and given.ids and given.prompt_ids):
            return None
        prompt, out = given.prompt_ids.count(b",") + 1, len(given.ids)
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + out, "completion_tokens": out}
        details = {"prompt_tokens_details": {"cached_tokens": self.cached}} if self.cached is not None else {}
        return Plan("end", last=encoded({**given.head, "choices": [], "usage": usage | details}) + DONE)

    @property
    def _wants_usage(self) -> bool:
        options = self._body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def _resumed(self) -> Plan | None:
        given = self.given
        if not (self.ask_ids and given.plain and given.prompt_ids and not given.finished):
            return None
        greedy, held = self._dialect.greedy(self._body), self._dialect.held_back(self._body)
        if greedy and self._dialect.counts_apart(self._body):
            return None  # repeating is exact, resuming is not
        mark = self._place(held, exactly=not greedy)
        if mark is None:
            return None if greedy else self._question()
        return self._from(mark, len(given.text) - mark.chars - held)

    def _from(self, mark: Mark, ahead: int, stops: Stops | None = None) -> Plan:
        """Goes on behind the tokens at `mark`. Of what comes, `ahead` characters have been given already."""
        given = self.given
        given.rewind(mark)
        without = ("stop",) if stops is not None else ()
        body = self._dialect.resume_body(self._endpoint, self._body, given.prompt_ids, given.ids, without)
        seam = Resume(given, mark, ahead, self._chat, stops, self._wants_usage)
        return Plan("resume", self._dialect.RESUME_PATH.encode(), body, seam)

    def _place(self, held: int, exactly: bool) -> Mark | None:
        """The last mark whose tokens' text has been given in full. What lies behind it will be generated again, which
        gives the same text only without chance: with chance, no text may lie behind it."""
        for mark in reversed(self.given.marks):
            if mark.chars + held <= len(self.given.text):
                return mark if not exactly or mark.chars + held == len(self.given.text) else None
        return None

    def _question(self) -> Plan:
        """What do all tokens so far say? And those up to the last one that is known to end with a whole character?"""
        given, ids = self.given, list(self.given.ids)
        whole = [mark for mark in list(given.marks)[-1:] if mark.ids < len(ids)]
        self._asked = (Mark(len(ids), 0), *whole)
        asks = (self._dialect.detokenize(self._body, ids[: mark.ids]) for mark in self._asked)
        return Plan("resume", questions=tuple(asks))

    def _after(self, replies: Sequence[bytes]) -> Plan | None:
        given, held = self.given, self._dialect.held_back(self._body)
        words, kept, least = self._dialect.stop_strings(self._body)
        for mark, reply in zip(self._asked, replies, strict=True):
            said = self._dialect.detokenized(reply)
            # Some tokenizers leave out the blank at the beginning of a text, which a stream has.
            for full in (said, " " + said) if said is not None else ():
                hidden = full[len(given.text) :]
                if not full.startswith(given.text) or full.endswith("\ufffd"):
                    continue
                if len(hidden) != held and (given.text or len(hidden) > held):
                    continue
                shown = given.text[-max(map(len, words), default=0) :] if words and kept else ""
                stops = Stops(words, kept, least - mark.ids, shown, hidden) if words else None
                return self._from(Mark(mark.ids, len(given.text)), 0, stops)
        return None


class OfTyped(Takeover):
    """/v1/responses and /v1/messages."""

    error_begins = b"event: error"

    def __init__(self, dialect: Dialect, endpoint: str, body: Body, keep: bool) -> None:
        self.told = Told()
        super().__init__(dialect, endpoint, body, keep, self.told)
        self._text = ""

    def _plan(self) -> Plan | None:
        if self.told.has("message_delta"):
            return Plan("end", last=typed_encoded({"type": "message_stop"}))
        if self.told.nothing or self._dialect.repeatable(self._endpoint, self._body):
            return Plan("repeat", None, self.sent, Again(self.told))
        text = onward.text_of(self._endpoint, self.told)
        questions = self._dialect.plain_questions(self._endpoint, self._body, text) if text is not None else None
        if text is None or questions is None:
            return None
        self._text = text
        return Plan("resume", questions=tuple(questions))

    def _after(self, replies: Sequence[bytes]) -> Plan | None:
        prompt, so_far = (self._dialect.tokens(reply) for reply in replies)
        known = self.prompt or self.told.prompt
        completion = self._dialect.as_completion(self._endpoint, self._body)
        if prompt is None or so_far is None or completion is None or len(prompt) != (known or len(prompt)):
            return None
        words, kept, _ = self._dialect.stop_strings(completion)
        if words and not kept:
            return None  # the text ends within a token, whose rest was kept back: another one would follow than a whole one
        stops = Stops(words, True, 0, self._text[-max(map(len, words)) :]) if words and kept else None
        ids, without = msgspec.json.encode(prompt), ("stop",) if stops is not None else ()
        body = self._dialect.resume_body(openai.COMPLETIONS, completion, ids, so_far, without)
        seam = Onward(self._endpoint, self.told, self._text, len(prompt), len(so_far), stops)
        return Plan("resume", self._dialect.RESUME_PATH.encode(), body, seam)


def takeover(dialect: Dialect, endpoint: str, body: Body, keep: bool) -> Takeover:
    return (OfChoices if endpoint in openai.CHOICES else OfTyped)(dialect, endpoint, body, keep)
