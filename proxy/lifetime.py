"""The life of a request: every state, transition and deadline. Whatever changes how a request can go must be here.

    RECEIVING --queue--> QUEUED, and from there as from RECEIVING (only where a target for the first token is set)
    RECEIVING --split--> PREFILLING --decode--> DECODING --first_byte--> STREAMING --end--> DONE
        `-----------------decode------------------^  `----------------------------end------^
                                              STREAMING --lost--> CONTINUING --resumed--> STREAMING
                                              CONTINUING --end--> DONE
    With --early-decode the consumer's leg is open in PREFILLING already; it is no state of its own: if the prefill fails it
    is dropped, if it fails itself it is made good in DECODING.
    With --early-token the producer's own first token makes a stream of it: DECODING is left before the consumer has spoken, and
    its first word is waited for as long as in DECODING.
    any live state --error--> FAILED          any live state --gone--> ABORTED   (the client left)

A request is in exactly one state, reaches exactly one terminal state, and never leaves it. Each live state has a bound
on how long nothing may happen in it; the bounds are the fields of Deadlines, in seconds. One of them, `send`, belongs
to every state: it bounds how long a client may refuse to read. QUEUED is bounded by half of the target for the first
token, or by five seconds where there is a target between tokens only (admission.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    RECEIVING = "receiving"
    QUEUED = "queued"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    STREAMING = "streaming"
    CONTINUING = "continuing"  # the engine died in mid-stream; another is to go on
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"

    __hash__ = object.__hash__  # Enum's own is Python code, and these are looked up all the time


class Event(Enum):
    QUEUE = "queue"
    SPLIT = "split"
    DECODE = "decode"
    FIRST_BYTE = "first_byte"
    LOST = "lost"
    RESUMED = "resumed"
    END = "end"
    ERROR = "error"
    GONE = "gone"

    __hash__ = object.__hash__


LIVE = (State.RECEIVING, State.QUEUED, State.PREFILLING, State.DECODING, State.STREAMING, State.CONTINUING)
TERMINAL = (State.DONE, State.FAILED, State.ABORTED)

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.RECEIVING, Event.QUEUE): State.QUEUED,
    (State.QUEUED, Event.SPLIT): State.PREFILLING,
    (State.QUEUED, Event.DECODE): State.DECODING,
    (State.RECEIVING, Event.SPLIT): State.PREFILLING,
    (State.RECEIVING, Event.DECODE): State.DECODING,
    (State.PREFILLING, Event.DECODE): State.DECODING,
    (State.DECODING, Event.FIRST_BYTE): State.STREAMING,
    (State.DECODING, Event.END): State.DONE,
    (State.STREAMING, Event.END): State.DONE,
    (State.STREAMING, Event.LOST): State.CONTINUING,
    (State.CONTINUING, Event.RESUMED): State.STREAMING,
    (State.CONTINUING, Event.END): State.DONE,
    **{(state, Event.ERROR): State.FAILED for state in LIVE},
    **{(state, Event.GONE): State.ABORTED for state in LIVE},
}


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds. Generous where an engine may be queueing, tight where only a network or a client can be slow."""

    head: float = 30.0  # before RECEIVING: from the opening of a connection, or its first byte, to the end of a head
    receive: float = 60.0  # RECEIVING: from the head of the request to the last byte of its body
    connect: float = 5.0  # PREFILLING, DECODING: to open a connection to an engine
    prefill: float = 600.0  # PREFILLING: all attempts together, connection to last byte of the reply
    answer: float = 1800.0  # DECODING: to the whole answer when it is not streamed, to its first event when it is
    event: float = 300.0  # STREAMING: between two pieces of the stream
    # CONTINUING: to the answers to what must be asked first, and then to the first event of the next engine, which may have
    # to compute the prompt
    resume: float = 120.0
    send: float = 60.0  # any state: the client does not read
    probe: float = 5.0  # one health probe of an instance
    drain: float = 300.0  # running requests of an instance that is taken out
    shutdown: float = 30.0  # running requests after a stop was asked for


class Lifetime:
    """Where one request is, and since when (perf_counter) it has been in each state so far. `on` raises KeyError for a
    transition that the table does not have: a bug of ours."""

    __slots__ = ("state", "times")

    def __init__(self, began: float | None = None) -> None:
        self.state = State.RECEIVING
        self.times = [(State.RECEIVING, time.perf_counter() if began is None else began)]

    def on(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]
        self.times.append((self.state, time.perf_counter()))

    @property
    def over(self) -> bool:
        return self.state in TERMINAL

    def __repr__(self) -> str:
        return f"<Lifetime {self.state.value}>"
