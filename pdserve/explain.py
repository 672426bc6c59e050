"""A request's record in sentences: where its time went, and where each part of its prompt came from. Pure.

What nobody has told is left out, or named as unknown; nothing is estimated here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

Record = dict[str, Any]
_WITHIN = ("queue", "load", "transfer")  # what an engine tells of the time before its first own token


def story(record: Record) -> list[str]:
    """Paragraphs, the first of them the summary; a line that begins with two spaces is an item of a list."""
    return [*_summary(record), *_timeline(record), *_cache(record)]


def _summary(record: Record) -> Iterator[str]:
    at = time.strftime("%H:%M:%S", time.localtime(record["received"]))
    ends = {"active": "has run for", "done": "was done in", "recovered": "was done, with help, in",
            "failed": "failed after", "cancelled": "was left by its client after"}[record["state"]]  # fmt: skip
    text = f"Request {record['id']} ({record['endpoint']}) came at {at} and {ends} {ms(record['duration_ms'])}"
    if record["ttft_ms"] is not None:
        text += f"; its first token went out after {ms(record['ttft_ms'])}"
    yield text + "."
    if record["error"]:
        yield f"Its error: {record['error']}"
    facts = []
    if record["prompt_tokens"] is not None:
        facts.append(f"{record['prompt_tokens']} tokens of prompt")
    if record["output_tokens"] is not None:
        facts.append(f"{record['output_tokens']} of answer")
    if facts:
        ending = f", ended by {record['finish_reason']}" if record["finish_reason"] else ""
        yield f"It had {' and '.join(facts)}{ending}."
    yield _route(record)


def _route(record: Record) -> str:
    if record["route"] == "pd":
        return f"Two engines shared it: {record['prefill']} computed the prompt, {record['decode'] or 'nobody'} the answer."
    if not record["decode"]:
        return "No engine was asked."
    reason = f" ({record['reason']})" if record["reason"] else ""
    return f"{record['decode']} did all of it{reason}."


def _timeline(record: Record) -> Iterator[str]:
    spans = record["spans"]
    own = [s for s in spans if s["name"] in ("queue", "prefill", "first_token", "decode", "retry") and not _told(s, record)]
    if not own:
        return
    yield ""
    yield "Where the time went:"
    if own[0]["start_ms"] >= 5:
        yield f"  {ms(own[0]['start_ms'])} until the request was read and understood"
    told = [s for s in spans if _told(s, record)]
    for span in own:
        yield f"  {_line(span, record, told)}"
    for span in told:
        if span["name"] == "store":
            what = _amount(span)
            trouble = f" ({span['detail']})" if span["detail"] else ""
            yield f"  beside it, {span['instance']} stored {what} in {ms(span['ms'])}{trouble}"


def _told(span: dict[str, Any], record: Record) -> bool:
    """Told by an engine, and not seen by the proxy."""
    return span["name"] in ("load", "transfer", "store") or (span["name"] == "queue" and span["instance"] != "proxy")


def _line(span: dict[str, Any], record: Record, told: list[dict[str, Any]]) -> str:
    took, who = ms(span["ms"]), span["instance"]
    if span["name"] == "queue":
        return f"{took} in the proxy's line, waiting for its turn"
    if span["name"] == "retry":
        return f"{took} lost: {span['detail']}"
    if span["name"] == "prefill":
        return f"{took} until {who} had computed the prompt{_inner(who, told)}"
    if span["name"] == "first_token":
        return f"{took} until {who} gave the first token{_inner(who, told)}"
    if record["ttft_ms"] is None:
        return f"{took} until {who} had the whole answer{_inner(who, told)}"
    each = ""
    if record["output_tokens"] and record["output_tokens"] > 1 and not span["detail"]:
        each = f", {span['ms'] / (record['output_tokens'] - 1):.1f} ms a token"
    return f"{took} for the rest of the answer on {who}{each}" + (f" ({span['detail']})" if span["detail"] else "")


def _inner(instance: str, told: list[dict[str, Any]]) -> str:
    parts = []
    for span in told:
        if span["instance"] != instance or span["name"] not in _WITHIN:
            continue
        took = ms(span["ms"])
        if span["name"] == "queue":
            parts.append(f"{took} in the engine's line")
        elif span["name"] == "transfer":
            parts.append(f"{took} for {_amount(span)} to come from the producer")
        else:
            tier = f" from {span['tier']}" if span["tier"] else ""
            parts.append(f"{took} loading {_amount(span)}{tier}")
    return f"; of that {', '.join(parts)}" if parts else ""


def _amount(span: dict[str, Any]) -> str:
    known = []
    if span["tokens"]:
        known.append(f"{span['tokens']} tokens")
    if span["bytes"]:
        known.append(f"{span['bytes'] / 2**20:.1f} MiB")
    return f"{known[0]} ({known[1]})" if len(known) == 2 else known[0] if known else "it"


def _cache(record: Record) -> Iterator[str]:
    yield ""
    cached, chunks = record["cached_tokens"], record.get("chunks")
    if cached is None and not chunks:
        yield (
            "Where its prompt came from is not known: no engine told of it, its cache daemon has forgotten it, or the "
            "proxy was not told of the daemon (--cache)."
        )
        return
    if cached is not None:
        yield _saved(record, cached)
    if chunks:
        yield "Its prompt, chunk by chunk:"
        for run in _runs(chunks):
            yield f"  {run}"
    for note in record.get("notes") or ():
        yield f"Note: {note}"


def _saved(record: Record, cached: dict[str, int]) -> str:
    total, parts = sum(cached.values()), [f"{tokens} from {_tier(tier)}" for tier, tokens in cached.items() if tokens]
    of = f" of {record['prompt_tokens']}" if record["prompt_tokens"] is not None else ""
    if not total:
        return f"None{of} tokens of the prompt were in any cache."
    text = f"{total}{of} tokens of the prompt were not computed: {', '.join(parts)}."
    if record["load_ms"]:
        text += f" Loading took {ms(record['load_ms'])}"
        if record["saved_ms"] is not None:
            word = "saved" if record["saved_ms"] >= 0 else "lost"
            text += f", which {word} {ms(abs(record['saved_ms']))} against computing"
        text += "."
    return text


def _runs(chunks: list[dict[str, Any]]) -> Iterator[str]:
    for (source, why), group in groupby(chunks, key=lambda chunk: (chunk["source"], chunk["why"])):
        run = list(group)
        first, last = run[0], run[-1]
        numbers = f"chunk {first['index']}" if first is last else f"chunks {first['index']}-{last['index']}"
        tokens = f"tokens {first['first_token']}-{last['first_token'] + last['tokens'] - 1}"
        told = f"computed: {why}" if source == "computed" else f"from {_tier(source)}"
        yield f"{numbers} ({tokens}): {told}"


def _tier(name: str) -> str:
    words = {"gpu": "the engine's own cache", "dram": "memory (dram)", "peer": "another host"}
    return words.get(name, name)


def ms(value: float) -> str:
    if value < 10:
        return f"{value:.1f} ms"
    return f"{value:.0f} ms" if value < 10_000 else f"{value / 1000:.1f} s"
