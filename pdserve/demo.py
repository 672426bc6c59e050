"""`pdserve demo`: starts a deployment with real engines, sends real requests, shows what came of it, stops it.

Exit code 0 only if everything held: the answers are those of plain vLLM (compare.py says what that means), the prompts
were handed over, and the repeated ones came out of the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median

from pdserve import output, topology
from pdserve import target as targets
from pdserve.compare import Rule
from pdserve.errors import ConfigError
from pdserve.openai_client import Client
from pdserve.prompts import Case, make_ids
from pdserve.target import Target
from pdserve.verify import Options, Report, Result, verify

ROLES = ("prefill", "decode", "both")
QUESTION = "What is the capital of France?"
SPARE_TOKENS = 64  # left of max_model_len for the answer


EXAMPLES = """examples:
  pdserve demo                          local-cpu: start, send, show, stop (one to two minutes)
  pdserve demo --keep                   leave it running, and say how to talk to it
  pdserve demo local-cpu-both --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a YAML file or a shipped name: what to start (default %(default)s)"
    parser.add_argument("topology", nargs="?", default="local-cpu", metavar="TOPOLOGY", help=what)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--keep", action="store_true", help="leave it running and say how to talk to it")
    parser.add_argument("--prompt-tokens", type=int, default=2800, help="length of the long prompts (default 2800)")
    parser.add_argument("--prompts", type=int, default=3, help="how many long prompts (default 3)")
    parser.add_argument("--seed", type=int, help="repeat an earlier run's prompts (default: fresh, printed)")


@dataclass(frozen=True, slots=True)
class Outcome:
    report: Report
    sources: dict[str, int]  # prompt tokens of all engines, by where they came from
    tiers: dict[str, float]  # bytes loaded, by tier
    answer: str


def main(args: argparse.Namespace) -> int:
    if args.prompts < 1 or args.prompt_tokens < 1:
        raise ConfigError("demo", "--prompts and --prompt-tokens must be at least 1")
    top = topology.load(args.topology)
    if top.cache is None:
        raise ConfigError("cache", f"missing in {args.topology}", "The demo shows the cache; add one.")
    with _deployment(top, args.keep, quiet=args.json) as target:
        outcome = run(target, args)
        if args.json:
            output.print_json(asdict(outcome) | {"ok": outcome.report.ok, "url": target.url})
        else:
            print_outcome(outcome, target)
    if args.keep and not args.json:
        _print_how_to_talk(target)
    return 0 if outcome.report.ok else 1


@contextlib.contextmanager
def _deployment(top: topology.Topology, keep: bool, quiet: bool) -> Iterator[Target]:
    """The one that runs already (an earlier --keep), or a fresh one with a plain engine beside it."""
    up = next((other for other in targets.running() if other.name == top.name and other.of("plain")), None)
    if up is not None:
        _say(f"using {up.name}, which runs already")
        yield Target.of(up)
        return
    with targets.started(top, plain=True, dev_mode=True, quiet=quiet, keep=keep, say=_say) as own:
        yield Target.of(own)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(target: Target, args: argparse.Namespace) -> Outcome:
    """Each prompt to plain vLLM (twice), through pdserve cold, and warm with the engines' own caches emptied."""
    dtype = target.dtype or target.ask_dtype() or "auto"
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**9)
    rng = random.Random(seed)
    with Client(target.plain_url) as plain:
        length = min(args.prompt_tokens, plain.max_model_len() - SPARE_TOKENS)
        cases = [Case(f"long {n + 1}", ids=make_ids(rng, plain.tokenize, length)) for n in range(args.prompts)]
    question = {"role": "user", "content": QUESTION}
    cases.append(Case("chat", messages=({"role": "system", "content": f"Notebook {seed}. Answer briefly."}, question)))
    before, tiers = target.prompt_tokens_by_source(*ROLES) or {}, target.loaded_by_tier()
    _say("sending requests")
    report = verify(target, cases, Options(seed, Rule.for_dtype(dtype), max_tokens=16), dtype=dtype)
    after = target.prompt_tokens_by_source(*ROLES) or {}
    with Client(target.url) as client:
        answer = client.chat([question], max_tokens=32).text
    return Outcome(
        report,
        {source: after[source] - before.get(source, 0) for source in after},
        {tier: value - tiers.get(tier, 0) for tier, value in target.loaded_by_tier().items()},
        answer,
    )


def print_outcome(outcome: Outcome, target: Target) -> None:
    """At most 80 columns wide."""
    from rich.table import Table

    console = output.console()
    report, long = outcome.report, [r for r in outcome.report.results if r.case.startswith("long")]
    plain = median(r.ttft_plain for r in long)
    title = f"{long[0].prompt_tokens}-token prompts, median of {len(long)}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, justify in (("", "left"), ("TTFT", "right"), ("of plain", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    how = "prefill, hand-over, decode" if target.is_pd else "computed and stored"
    rows = (
        ("plain vLLM, computed", plain),
        (f"pdserve cold: {how}", median(r.ttft_cold for r in long)),
        ("pdserve warm: from the cache", median(r.ttft_warm for r in long)),
    )
    for name, seconds in rows:
        table.add_row(name, f"{seconds:.2f} s", f"{seconds / plain:.2f}")
    console.print(table)
    s = outcome.sources
    if s:
        tiers = ", ".join(f"{tier} {size / 1e6:.0f} MB" for tier, size in outcome.tiers.items() if size)
        console.print(
            f"Prompt tokens: {s['local_compute']} computed, {s['local_cache_hit']} from the engines' own caches, "
            f"{s['external_kv_transfer']} retrieved from pdserve's cache ({tiers or 'nothing'})."
        )
    console.print(_equality(report.results, report.rule))
    console.print(f"{QUESTION} -> {outcome.answer.strip()}")
    problems = [*report.problems, *(f"{r.case}: {p}" for r in report.results for p in r.problems)]
    for problem in problems:
        console.print(problem, style="red")
    console.print(f"{'OK' if report.ok else 'FAILED'} (seed {report.seed}, {report.dtype}, {report.seconds:.0f} s)")


def _equality(results: list[Result], rule: str) -> str:
    answers = [c for r in results for c in (r.cold, r.warm)]
    same, exact = sum(c.same for c in answers), sum(c.tokens_equal for c in answers)
    own = sum(r.plain_hit.tokens_equal for r in results)
    return (
        f"Answers as plain vLLM's ({rule}): {same} of {len(answers)}; token for token {exact} of {len(answers)}, "
        f"plain vLLM's own prefix hits {own} of {len(results)}."
    )


def _print_how_to_talk(target: Target) -> None:
    with Client(target.url) as client:
        body = json.dumps({"model": client.model, "messages": [{"role": "user", "content": QUESTION}]})
    print(f"\nrunning: {target.url}\n")
    print(f"  curl {target.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print(f"\nstop it with: pdserve stop {target.name}")
