"""Asks plain vLLM and pdserve the same, row by row, and writes what came out: docs/conformance.md.

    pdserve launch tests/e2e/conformance.yaml --detach
    pdserve proxy --port 8011 --prefill http://127.0.0.1:8110 --decode http://127.0.0.1:8210 --early-decode --early-token &
    python tests/e2e/conformance.py [--out docs/conformance.md]

Every row is asked of plain vLLM, of the deployment's proxy, and of the second one, which hands the producer's own first token on.
Equal means: the same status, and the same JSON or the same events, but for what must differ (ids, times, which tokens
were cached). Streams may be cut into events differently, since an engine that falls behind puts two tokens into one:
what they add up to must be the same. Exit 1 if any row is not equal.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from conformance_rows import LONG, ROWS, Row

_VOLATILE = {"id", "created", "created_at", "completed_at", "request_id", "kv_transfer_params", "prompt_tokens_details",
             "input_tokens_details", "item_id", "cache_read_input_tokens", "sequence_number", "call_id",
             "cache_creation_input_tokens", "system_fingerprint"}  # fmt: skip


class Answer(NamedTuple):
    status: int
    kind: str
    route: str
    raw: bytes
    content: Any
    first: bool = False  # the producer's own first token began it


class Result(NamedTuple):
    row: Row
    streamed: bool
    plain: Answer
    ours: Answer
    early: Answer

    @property
    def verdicts(self) -> tuple[str, str]:
        return verdict(self.plain, self.ours), verdict(self.plain, self.early) + ", begun by the producer" * self.early.first

    @property
    def equal(self) -> bool:
        return all(said.startswith("equal") for said in self.verdicts)


def verdict(plain: Answer, ours: Answer) -> str:
    if plain.status != ours.status:
        return f"**different status**: {plain.status}, {ours.status}"
    if same(plain.content, ours.content):
        return "equal"
    if plain.kind == "sse" == ours.kind and same(total(plain.content), total(ours.content)):
        return "equal (events cut differently)"
    if isinstance(plain.content, dict) and set(plain.content) == {"detail"}:
        return "equal status; the error is put into OpenAI's form"
    if plain.status >= 400 and counted(plain.content) == counted(ours.content):
        return "equal but for the number of fields in vLLM's message: it counts the prefill leg's"
    return "**different**"


def counted(content: object) -> str:
    return re.sub(r"<dict of \d+ items>", "<dict>", str(content))


def ask(client: httpx.Client, url: str, model: str, row: Row, streamed: bool) -> Answer:
    if row.body is None:
        reply = client.get(url + row.path)
    else:
        body = {"model": model, **row.body} | ({"stream": True} if streamed else {})
        reply = client.post(url + row.path, json=body)
    kind = reply.headers.get("content-type", "")
    route = reply.headers.get("x-pdserve-route", "")
    if why := reply.headers.get("x-pdserve-reason"):
        route += f" ({why})"
    if kind.startswith("text/event-stream"):
        first = "x-pdserve-first-token" in reply.headers
        return Answer(reply.status_code, "sse", route, reply.content, [stable(e) for e in events(reply.text)], first)
    return Answer(reply.status_code, "json", route, reply.content, stable(reply.json()))


def events(text: str) -> Iterator[Any]:
    for piece in text.split("\n\n"):
        data = "\n".join(line[5:].strip() for line in piece.splitlines() if line.startswith("data:"))
        if data:
            yield data if data == "[DONE]" else json.loads(data)


def stable(value: Any) -> Any:
    """The value without what differs between any two answers."""
    if isinstance(value, dict):
        if "cache_read_input_tokens" in value:  # Anthropic counts cached tokens apart from the others
            value = value | {"input_tokens": value["input_tokens"] + (value["cache_read_input_tokens"] or 0)}
        return {k: stable(v) for k, v in value.items() if k not in _VOLATILE}
    return [stable(item) for item in value] if isinstance(value, list) else value


def same(one: Any, two: Any) -> bool:
    """Equal, log probabilities within what the order of a sum may change."""
    if isinstance(one, float) and isinstance(two, float):
        return abs(one - two) <= 1e-3 * max(1.0, abs(one))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and bool(one == two)


def total(found: list[Any]) -> Any:
    """What the events of a stream add up to: texts joined, lists put together, the last word on everything else."""
    sums: dict[str, Any] = {}
    for event in found:
        add(sums, "", event)
    return sums


def add(sums: dict[str, Any], path: str, value: Any) -> None:
    if isinstance(value, dict):
        path += f"[{value['index']}]" if "index" in value else ""
        for key, item in value.items():
            add(sums, f"{path}.{key}", item)
    elif isinstance(value, list) and value and isinstance(value[0], dict) and "index" in value[0]:
        for item in value:
            add(sums, path, item)
    elif path.endswith((".text", ".content", ".arguments", ".delta")) and isinstance(value, str):
        sums[path] = sums.get(path, "") + value
    elif path.endswith("token_ids") or ".logprobs" in path:
        sums[path] = (sums.get(path) or []) + (value if isinstance(value, list) else [value] if value else [])
    elif value is not None:
        sums[path] = value


def cached(client: httpx.Client, url: str, model: str, stream: bool) -> list[int | None]:
    """cached_tokens as told for a new prompt and for the same once more."""
    told = []
    prompt = f"{url} {stream} " + LONG
    for _ in range(2):
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        reply = client.post(url + "/v1/completions", json=body)
        usage = list(events(reply.text))[-2]["usage"] if stream else reply.json()["usage"]
        told.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
    return told


def table(results: list[Result], hits: dict[str, list[int | None]], version: str) -> str:
    lines = [
        "# What pdserve answers, beside plain vLLM", "",
        "Generated by `python tests/e2e/conformance.py`; do not edit. "
        f"vLLM {version}; each cell is an answer of real engines, float32 on the CPU, "
        "one producer and one or two consumers behind the proxy, one plain engine beside it. Last column: with "
        "`early_decode` and `early_token`, where the producer's own first token may begin a stream.", "",
        "*Equal* means the same status and the same JSON or events, but for ids, times and counts of cached tokens. "
        "*Route* is the proxy's x-pdserve-route header: `pd` over both legs, `local` on the consumer alone (with the "
        "reason), `passthrough` for what is not split.", "",
        f"{len(results)} requests compared, {sum(r.equal for r in results)} equal in both settings.", "",
    ]  # fmt: skip
    for path in dict.fromkeys(r.row.path for r in results):
        lines += [
            f"## {path}",
            "",
            "| request | answer | status | route | pdserve beside vLLM | with the early first token |",
            "|---|---|---|---|---|---|",
        ]
        for r in results:
            if r.row.path == path:
                how = "streamed" if r.streamed else "whole"
                lines.append(f"| {r.row.name} | {how} | {r.plain.status} | {r.ours.route or '-'} | {' | '.join(r.verdicts)} |")
        lines.append("")
    if not hits:
        return "\n".join(lines)
    lines += [
        "## usage.prompt_tokens_details.cached_tokens",
        "",
        "| engine | new prompt | the same again |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {told[0]} | {told[1]} |" for name, told in hits.items()]
    return "\n".join([*lines, ""])


def merged(old: str, new: str) -> str:
    """The page `old` with the sections that `new` has, and the counts in its head made right."""
    parts = {text: dict(section.split("\n", 1) for section in text.split("\n## ")[1:]) for text in (old, new)}
    order = [*dict.fromkeys(row.path for row in ROWS)]
    found = parts[old] | parts[new]
    sections = {name: found[name] for name in [*order, *(name for name in found if name not in order)] if name in found}
    rows = [line for name, section in sections.items() if name.startswith("/") for line in section.splitlines()]
    rows = [line for line in rows if line.startswith("| ") and not line.startswith("| request |")]
    equal = sum(all(cell.startswith(" equal") for cell in line.split("|")[5:-1]) for line in rows)
    head = re.sub(r"\d+ requests compared, \d+ equal", f"{len(rows)} requests compared, {equal} equal", old.split("\n## ")[0])
    return "\n## ".join([head, *(f"{name}\n{section.rstrip()}\n" for name, section in sections.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--proxy", default="http://127.0.0.1:8010")
    parser.add_argument("--early", default="http://127.0.0.1:8011", help="a proxy before the same engines, with --early-token")
    parser.add_argument("--plain", default="http://127.0.0.1:8310")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="rows whose name or path contains this")
    parser.add_argument("--merge", action="store_true", help="put the rows into the page at --out, beside those it has")
    args = parser.parse_args()
    results, hits = [], {}
    with httpx.Client(timeout=300) as client:
        model = client.get(args.proxy + "/v1/models").json()["data"][0]["id"]
        version = client.get(args.plain + "/version").json()["version"]
        for row in ROWS:
            if args.only and args.only not in row.name + " " + row.path:
                continue
            for streamed in (False, True) if row.streams else (False,):
                urls = (args.plain, args.proxy, args.early)
                result = Result(row, streamed, *(ask(client, url, model, row, streamed) for url in urls))
                results.append(result)
                if not result.equal:
                    print(f"{row.path} {row.name}{' streamed' * streamed}: {result.verdicts}\n"
                          f"  vLLM    {result.plain.raw[:1500]!r}\n  pdserve {result.ours.raw[:1500]!r}\n"
                          f"  early   {result.early.raw[:1500]!r}")  # fmt: skip
        for stream in () if args.merge else (False, True):
            for name, url in (("plain vLLM", args.plain), ("pdserve, pd", args.proxy), ("pdserve, early", args.early)):
                hits[f"{name}{', streamed' * stream}"] = cached(client, url, model, stream)
    text = table(results, hits, version)
    if args.out:
        args.out.write_text(merged(args.out.read_text(), text) if args.merge else text)
    print(text if not args.out else f"{len(results)} requests, written to {args.out}")
    return 0 if all(r.equal for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
