"""`pdserve verify`: the same prompts through plain vLLM, through pdserve cold, through pdserve warm: all the same?

What counts as a difference is in pdserve/compare.py. Beside the answers it checks that the cache did what it is for:
the cold run of a PD deployment hands the prompt over, the warm run is served from the cache, no chunk failed its
digest, and nothing is left leased or reserved.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pdserve import output
from pdserve import target as targets
from pdserve.compare import DEFAULT_TOLERANCE, TOP_LOGPROBS, Comparison, Rule, compare
from pdserve.errors import ConfigError
from pdserve.openai_client import Client, Completion
from pdserve.prompts import LENGTHS, QUICK_LENGTHS, Case, suite
from pdserve.target import CacheCounters, Target

# How long leases and reservations may outlive the last answer.
SETTLE_SECONDS = 10.0


EXAMPLES = """examples:
  pdserve verify local-cpu                       starts it, with a plain engine beside it; some minutes
  pdserve verify local-cpu --quick --json
  pdserve verify http://host:8000 --plain http://host:8300 --dtype bfloat16
  pdserve verify my.yaml --prompts mine.jsonl    one JSON value a line: a text, token ids, or chat messages
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a topology YAML (started if it is not running), the name of a running one, or a URL"
    parser.add_argument("target", nargs="?", metavar="TOPOLOGY|URL|NAME", help=what)
    parser.add_argument("--plain", metavar="URL", help="an engine without any connector to compare with")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, up to 513 tokens")
    parser.add_argument("--prompts", metavar="FILE", help="one JSON value a line: a text, token ids, or chat messages")
    parser.add_argument("--lengths", metavar="N,N", help="prompt lengths in tokens, instead of the built-in list")
    parser.add_argument("--max-tokens", type=int, default=12, help="tokens to generate per prompt (default 12)")
    parser.add_argument("--seed", type=int, help="repeat an earlier run's prompts (default: fresh, printed)")
    parser.add_argument("--dtype", help="the engines' dtype, where neither topology nor engine tells it")
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"allowed log-probability difference, where tokens need not be equal (default {DEFAULT_TOLERANCE})",
    )
    parser.add_argument("--cache-admin", metavar="URL", help="the cache daemon's admin address, when a URL is verified")
    parser.add_argument("--chunk-tokens", type=int, help="the cache's chunk size, when a URL is verified (default 256)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request (default 300)")


@dataclass(frozen=True, slots=True)
class Options:
    seed: int
    rule: Rule
    max_tokens: int = 12
    timeout: float = 300.0


@dataclass(slots=True)
class Result:
    """One prompt's outcome. `retrieved_*`: tokens that came out of the cache, None where no engine could be asked."""

    case: str
    prompt_tokens: int
    cold: Comparison
    warm: Comparison
    plain_hit: Comparison
    cold_cached: int | None
    warm_cached: int | None
    retrieved_cold: int | None
    retrieved_warm: int | None
    ttft_plain: float
    ttft_cold: float
    ttft_warm: float
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    seed: int
    rule: str
    dtype: str
    caches_emptied: bool
    results: list[Result]
    cache: dict[str, float]
    problems: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.problems and not any(r.problems for r in self.results)

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def main(args: argparse.Namespace) -> int:
    """The command. 0: everything equal and hit; 1: a difference that counts; 2: it could not be asked."""
    if args.max_tokens < 1 or (args.tolerance or 0) < 0 or args.timeout <= 0:
        raise ConfigError("verify", "--max-tokens, --tolerance and --timeout must be positive")
    if not args.json:
        return _run(args, lambda text: print(text, file=sys.stderr, flush=True))
    return _run(args, lambda text: None)


def _run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    with targets.opened(args.target, plain=args.plain, cache_admin=args.cache_admin, say=say) as target:
        if args.chunk_tokens:
            target.chunk_tokens = args.chunk_tokens
        dtype = args.dtype or target.dtype or target.ask_dtype()
        if dtype is None:
            raise ConfigError("--dtype", "the engines do not tell their dtype", "Say it, e.g. --dtype bfloat16.")
        seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**9)
        options = Options(seed, Rule.for_dtype(dtype, args.tolerance, target.payload), args.max_tokens, args.timeout)
        with Client(target.plain_url, timeout=args.timeout) as plain:
            cases = _cases(args, seed, plain)
        report = verify(target, cases, options, dtype=dtype, say=say)
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        print_table(report)
    return 0 if report.ok else 1


def _cases(args: argparse.Namespace, seed: int, plain: Client) -> list[Case]:
    if args.prompts:
        return _read_prompts(Path(args.prompts))
    lengths: Sequence[int] = QUICK_LENGTHS if args.quick else LENGTHS
    if args.lengths:
        try:
            lengths = [int(n) for n in args.lengths.split(",")]
        except ValueError:
            raise ConfigError("--lengths", f"{args.lengths!r} is not a list of numbers", "Write 1,16,300.") from None
    return suite(seed, plain.tokenize, lengths=lengths, max_prompt=plain.max_model_len() - args.max_tokens)


def _read_prompts(path: Path) -> list[Case]:
    if not path.is_file():
        raise ConfigError("--prompts", f"{path} is not a file")
    cases = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise ConfigError("--prompts", f"{path}:{number} is not JSON", "One JSON value a line.") from None
        name = f"line {number}"
        if isinstance(value, str):
            cases.append(Case(name, text=value))
        elif isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            cases.append(Case(name, ids=tuple(value)))
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            cases.append(Case(name, messages=tuple(value)))
        else:
            raise ConfigError("--prompts", f"{path}:{number} is neither a text, nor token ids, nor chat messages")
    return cases


def verify(
    target: Target,
    cases: Sequence[Case],
    options: Options,
    *,
    dtype: str,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Sends every case four times (plain, plain again, cold, warm) and compares; see the module's head."""
    start = time.monotonic()
    say(f"verify: seed {options.seed}, {dtype}: {options.rule}; {len(cases)} prompts, {options.max_tokens} tokens each")
    with (
        Client(target.plain_url, timeout=options.timeout) as plain,
        Client(target.url, timeout=options.timeout) as client,
    ):
        _warm_up(plain, client)
        before = target.cache_counters()
        emptied = target.empty_engine_caches()
        results = []
        with output.steps(total=len(cases)) as progress:
            for n, case in enumerate(cases):
                progress.step(case.name, n)
                results.append(_verify_case(target, plain, client, case, options))
    cache = target.cache_counters() - before
    problems = _cache_problems(target, cache, results)
    return Report(
        options.seed, str(options.rule), dtype, emptied, results, asdict(cache), problems, time.monotonic() - start
    )


def _warm_up(*clients: Client) -> None:
    """The first requests of an engine compile and allocate; they would only blur the times."""
    for client in clients:
        for count in (7, 300):
            client.complete([11] * count, max_tokens=2, logprobs=TOP_LOGPROBS)


def _verify_case(target: Target, plain: Client, client: Client, case: Case, options: Options) -> Result:
    def ask(to: Client) -> Completion:
        return case.send(to, max_tokens=options.max_tokens, logprobs=TOP_LOGPROBS)

    plain.reset_prefix_cache()
    reference, again = ask(plain), ask(plain)
    emptied = target.empty_engine_caches()
    at_start = target.retrieved_tokens()
    cold = ask(client)
    at_cold = target.retrieved_tokens()
    target.empty_engine_caches()
    warm = ask(client)
    at_warm = target.retrieved_tokens()
    result = Result(
        case=case.name,
        prompt_tokens=reference.prompt_tokens,
        cold=compare(reference, cold, options.rule),
        warm=compare(reference, warm, options.rule),
        plain_hit=compare(reference, again, options.rule),
        cold_cached=cold.cached_tokens,
        warm_cached=warm.cached_tokens,
        retrieved_cold=None if at_start is None or at_cold is None else at_cold - at_start,
        retrieved_warm=None if at_cold is None or at_warm is None else at_warm - at_cold,
        ttft_plain=reference.ttft,
        ttft_cold=cold.ttft,
        ttft_warm=warm.ttft,
    )
    result.problems = _case_problems(target, result, emptied)
    return result


def _case_problems(target: Target, r: Result, emptied: bool) -> list[str]:
    problems = [f"{name}: {c.reason}" for name, c in (("cold", r.cold), ("warm", r.warm)) if not c.same]
    # Whole chunks before the last token: at least those must come back. The engine itself computes the last token.
    whole = (r.prompt_tokens - 1) // target.chunk_tokens * target.chunk_tokens
    if target.has_cache and (r.warm_cached or 0) < whole:
        problems.append(f"warm: {r.warm_cached or 0} tokens cached, at least {whole} expected")
    if emptied and target.has_cache and r.retrieved_warm is not None and r.retrieved_warm < whole:
        problems.append(f"warm: {r.retrieved_warm} tokens came from the cache, at least {whole} expected")
    if emptied and target.is_pd and r.retrieved_cold is not None and r.retrieved_cold < whole:
        problems.append(f"cold: {r.retrieved_cold} tokens handed over, at least {whole} expected")
    return problems


def _cache_problems(target: Target, cache: CacheCounters, results: Sequence[Result]) -> list[str]:
    if not target.has_cache:
        return []
    problems = []
    if cache.digest_failures:
        problems.append(f"{cache.digest_failures:g} chunks failed their digest")
    if target.admin_url and any(r.prompt_tokens > target.chunk_tokens for r in results):
        if not cache.stored_chunks:
            problems.append("the cache daemon stored no chunk")
        if not cache.loaded_chunks:
            problems.append("no chunk was loaded from the cache daemon")
    left = target.wait_for_no_leases(SETTLE_SECONDS)
    if left:
        problems.append(f"left in the cache daemon: {left}")
    return problems


def print_table(report: Report) -> None:
    """The table for people; fits 80 columns."""
    from rich.table import Table
    from rich.text import Text

    console = output.console()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("prompt", "tokens", "cold", "warm", "plain hit", "from cache", "TTFT plain/cold/warm s"):
        table.add_column(name, justify="left" if name == "prompt" else "right", no_wrap=name == "prompt")
    for r in report.results:
        retrieved = r.warm_cached if r.retrieved_warm is None else r.retrieved_warm
        times = f"{r.ttft_plain:.2f}/{r.ttft_cold:.2f}/{r.ttft_warm:.2f}"
        marks = [_mark(r.cold), _mark(r.warm), _mark(r.plain_hit, counts=False)]
        cells = [r.case, str(r.prompt_tokens), *marks, "-" if retrieved is None else str(retrieved), times]
        table.add_row(*(Text(c, style="red" if c == "DIFFERS" else "") for c in cells))
    console.print(table)
    results = report.results
    exact = [sum(c.tokens_equal for c in (getattr(r, k) for r in results)) for k in ("cold", "warm", "plain_hit")]
    n = len(results)
    console.print(
        f"Tokens equal to plain vLLM's: cold {exact[0]}/{n}, warm {exact[1]}/{n}, its own prefix hit {exact[2]}/{n}. "
        f"Largest log-probability difference: cold {_worst(results, 'cold'):.2g}, warm {_worst(results, 'warm'):.2g}, "
        f"its own hit {_worst(results, 'plain_hit'):.2g}.",
        highlight=False,
    )
    c = report.cache
    if c["stored_chunks"] or c["loaded_chunks"]:
        console.print(
            f"Cache: {c['stored_chunks']:g} chunks stored, {c['loaded_chunks']:g} loaded with their digests checked, "
            f"{c['digest_failures']:g} failed.",
            highlight=False,
        )
    if not report.caches_emptied:
        console.print("Engines kept their own prefix caches (no VLLM_SERVER_DEV_MODE): warm may have hit those.")
    for r in results:
        for problem in r.problems:
            console.print(f"{r.case}: {problem}", style="red", highlight=False)
    for problem in report.problems:
        console.print(problem, style="red", highlight=False)
    verdict = "OK" if report.ok else "FAILED"
    console.print(f"{verdict} ({report.rule}; seed {report.seed}; {report.seconds:.0f} s)", highlight=False)


def _mark(c: Comparison, counts: bool = True) -> str:
    if c.tokens_equal:
        return "equal" if c.same or not counts else "DIFFERS"
    if c.same or not counts:
        return f"at {c.parted}"
    return "DIFFERS"


def _worst(results: Sequence[Result], which: str) -> float:
    return max((getattr(r, which).max_difference for r in results), default=0.0)
