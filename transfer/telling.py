"""What an engine tells the daemon of its requests, for people who ask later: plain structs, one message, no answer.

It is told in passing: a daemon that is busy, or gone, is told nothing, and nobody waits. Every field is bounded. Tokens
never travel: of a prompt go its chunks' keys, and marks made from its tokens, which only tell two prompts apart.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pdserve.chunk import KEY_BYTES

MOST_CHUNKS = 16384
#: tokens of a prompt that have marks
MOST_MARKS = 1 << 16
MARK_BYTES, EDGE_BYTES = 2, 8
MOST_ITEMS = 256

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Short = Annotated[bytes, msgspec.Meta(max_length=16)]
Text = Annotated[str, msgspec.Meta(max_length=300)]
LegId = Annotated[str, msgspec.Meta(max_length=800)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e10)]


class _Told(msgspec.Struct, array_like=True, frozen=True, gc=False):
    pass


class Span(_Told, frozen=True, tag=1):
    """A piece of time in a leg; `at` is unix time."""

    leg: LegId
    name: Text  # queue, load, transfer, store
    at: Seconds
    ms: Seconds
    bytes: Count | None = None
    tokens: Count | None = None
    tier: Text = ""
    detail: Text = ""


class Leg(_Told, frozen=True, tag=2):
    """What was decided about a prompt, told once its own tokens begin to be computed."""

    #: the engine's id of it, which has the client's in it
    leg: LegId
    traceparent: Text
    #: when the cache was asked, unix time
    at: Seconds
    tokens: Count
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    #: what is hashed into every key: model and layout, adapter, salt
    base: Short
    lora: Text
    tag: Short
    #: of all chunks from the first on, the tail's the last
    keys: Annotated[list[Key], msgspec.Meta(max_length=MOST_CHUNKS)]
    #: tokens that the engine had itself; tokens up to which they were loaded behind that, chunk by chunk from these tiers
    local: Count
    covered: Count
    first_chunk: Count
    tiers: Annotated[list[Text], msgspec.Meta(max_length=MOST_CHUNKS)]
    #: chunks that the cache had, loaded or not, from first_chunk on
    found: Count
    #: why what was found was not loaded, or nothing was asked: a word of breakeven.Reason, or a sentence
    why: Text
    saved_ms: float | None = None
    #: MARK_BYTES for each token, EDGE_BYTES for the end of each full chunk: each stands for all tokens up to there
    marks: Annotated[bytes, msgspec.Meta(max_length=MOST_MARKS * MARK_BYTES)] = b""
    edges: Annotated[bytes, msgspec.Meta(max_length=MOST_CHUNKS * EDGE_BYTES)] = b""


class Ended(_Told, frozen=True, tag=3):
    leg: LegId
    output_tokens: Count
    reason: Text
    #: of prompt and answer together
    tokens: Count = 0
    marks: Annotated[bytes, msgspec.Meta(max_length=MOST_MARKS * MARK_BYTES)] = b""
    edges: Annotated[bytes, msgspec.Meta(max_length=MOST_CHUNKS * EDGE_BYTES)] = b""


class Began(_Told, frozen=True, tag=4):
    """What was cached of a prompt, told at once when its own tokens begin to be computed. What else is told of it follows."""

    leg: LegId
    #: unix time
    at: Seconds
    #: tokens that are not computed, by where they were; "gpu" is the engine's own cache
    cached: Annotated[dict[Text, Count], msgspec.Meta(max_length=64)]
    load_ms: Seconds | None = None
    saved_ms: float | None = None
    #: why it was loaded, or was not: a word of breakeven.Reason; empty where nothing was found
    load_reason: Text = ""


class Facts(_Told, frozen=True, tag=9):
    """Is not answered. `lost`: facts that were not told, because there was no room for them."""

    items: Annotated[list[Span | Leg | Ended | Began], msgspec.Meta(max_length=MOST_ITEMS)]
    lost: Count = 0
