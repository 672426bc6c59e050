"""The words of `pdserve bench`: one per workload, and quick, compare."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import textwrap
from pathlib import Path

from pdserve.bench import workloads
from pdserve.errors import ConfigError

EXAMPLES = """examples:
  pdserve bench                                                 quick figures of the deployment that runs
  pdserve bench long-doc-qa http://127.0.0.1:8000 --out res     any OpenAI server
  pdserve bench multi-round-qa --num-users 20 --qps 0.5 --slo-ttft 2
  pdserve bench trace-replay --trace-directory traces --scale 0.02 --duration 120 --start-users 2 --max-users 16 --slo-ttft 5
  pdserve bench long-doc-qa --arms no-cache,gpu-cache,cache --topology local-cpu-both --repetitions 3 --out res
  pdserve bench compare res/a.json res/b.json
  pdserve bench report res
  pdserve bench regimes --topology local-cpu-both --out res
"""


#: what `pdserve bench WORKLOAD --help` shows; the rest of the line after `pdserve bench WORKLOAD`
SHOWN = {
    "long-doc-qa": "--num-documents 20 --document-length 10000 --output-len 300",
    "multi-round-qa": "--num-users 20 --qps 0.5 --slo-ttft 2 --out res",
    "sharegpt": "--dataset-path conversations.json --rate 2 --duration 120",
    "cache-rate": "--rates 0,50,100 --arms gpu-cache,cache --topology local-cpu-both --scale 0.3",
    "working-set": "--working-sets 20000,200000 --arms gpu-cache,cache --out res",
    "pd-interference": "--arms gpu-cache,pd --topology local-cpu --scale 0.1 --out res",
    "trace-replay": "--trace-directory traces --scale 0.02 --duration 120",
}


#: what a workload cannot do without
NEEDED = {"sharegpt": " --dataset-path conversations.json", "trace-replay": " --trace-directory traces --duration 60"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pdserve.bench.regimes import cli as regimes_cli  # it needs this module's `say`

    words = parser.add_subparsers(dest="word", metavar="WORD")
    shown = "examples:\n  pdserve bench quick\n  pdserve bench quick http://127.0.0.1:8000 --requests 4 --json"
    _add_quick(
        words.add_parser(
            "quick", help="first tokens cold and warm, and throughput, of what runs (the default)", epilog=shown
        )
    )
    for name in workloads.NAMES:
        module = workloads.module(name)
        one = words.add_parser(name, help=module.HELP, description=_folded(module.__doc__ or ""), epilog=_shown(name))
        module.add_arguments(one.add_argument_group("workload"))
        add_common(one)
    compare = words.add_parser(
        "compare",
        help="two results beside each other, with intervals and verdicts",
        epilog="examples:\n  pdserve bench compare before/random.json after/random.json",
    )
    compare.add_argument("a", metavar="A.json", type=Path, help="the baseline")
    compare.add_argument("b", metavar="B.json", type=Path, help="what is compared with it")
    compare.add_argument("--json", action="store_true", help="as data")
    report = words.add_parser(
        "report",
        help="write report.html of the results in a folder",
        epilog="examples:\n  pdserve bench report docs/measurements --out /tmp/report.html",
    )
    report.add_argument("folder", metavar="DIR", type=Path, help="where results were written with --out")
    report.add_argument("--out", metavar="FILE", type=Path, help="where to write it (default DIR/report.html)")
    report.add_argument("--json", action="store_true", help="say what was written, as data")
    regimes = words.add_parser(
        "regimes",
        help="which strategy wins at which working set, length, reuse and load, and does the adaptive one keep up",
        epilog=regimes_cli.EXAMPLES,
    )
    regimes_cli.add_arguments(regimes)


def _folded(text: str) -> str:
    """A docstring's paragraphs in lines that fit a terminal."""
    return "\n\n".join(textwrap.fill(" ".join(p.split()), 78) for p in text.split("\n\n"))


def _shown(name: str) -> str:
    more = SHOWN.get(name, "--scale 0.1 --seed 7 --out res")
    needed = NEEDED.get(name, "")
    return f"examples:\n  pdserve bench {name} http://127.0.0.1:8000{needed}\n  pdserve bench {name} {more}"


def default_words(words: list[str]) -> list[str]:
    """`pdserve bench`, `pdserve bench URL` and `pdserve bench --requests 4` mean `quick`."""
    known = ("quick", *workloads.NAMES, "compare", "report", "regimes", "-h", "--help")
    if words and words[0] in known:
        return words
    named = words[0] if words and not words[0].startswith("-") and "://" not in words[0] else ""
    near = difflib.get_close_matches(named, known[:-2], 1)
    if near or (named and len(words) > 1 and not words[1].startswith("-")):  # `quick` takes one deployment's name, not two
        fix = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known[:-2])}."
        raise ConfigError("bench", f"{named!r} is no workload", fix)
    return ["quick", *words]


def main(args: argparse.Namespace) -> int:
    if args.word in (None, "quick"):
        from pdserve.bench import quick

        return quick.main(args)
    if args.word == "compare":
        from pdserve.bench import show

        return show.compare(args)
    if args.word == "regimes":
        from pdserve.bench.regimes import cli as regimes_cli

        return regimes_cli.main(args)
    if args.word == "report":
        from pdserve.bench.report import page

        return page.main(args)
    from pdserve.bench import one

    return one.main(args)


def _add_quick(parser: argparse.ArgumentParser) -> None:
    from pdserve.bench import quick

    quick.add_arguments(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every workload has: whom to ask, how to send, what to keep."""
    whom = parser.add_argument_group("whom to ask")
    whom.add_argument("target", nargs="?", help="URL, or name of a running deployment (default: the one that runs)")
    whom.add_argument("--model", default="", help="model name to send (default: the first that the server lists)")
    whom.add_argument(
        "--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="bearer token (default: OPENAI_API_KEY)"
    )
    whom.add_argument(
        "--header", action="append", default=[], metavar="NAME=VALUE", help="another header for every request"
    )
    whom.add_argument(
        "--endpoint", choices=("completions", "chat"), help="default: what the workload's known tool uses"
    )
    whom.add_argument("--extra-body", default="{}", metavar="JSON", help="goes into every request's body")
    whom.add_argument(
        "--no-ignore-eos", action="store_true", help="answers may end early (for servers that refuse ignore_eos)"
    )
    add_load(parser)
    add_arms(parser)
    keep = parser.add_argument_group("what to keep")
    keep.add_argument(
        "--out", metavar="DIR", type=Path, help="write raw records as JSON and CSV, and report.html, there"
    )
    keep.add_argument("--name", default="", help="file name of this result (default: the workload's)")
    keep.add_argument("--json", action="store_true", help="print the figures as data")
    keep.add_argument("--quiet", action="store_true", help="no progress")


def add_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("how to send")
    load.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests (default %(default)s)")
    load.add_argument(
        "--scale", type=float, default=1.0, help="multiplies every length in tokens (default %(default)s)"
    )
    load.add_argument(
        "--rate", type=float, default=0.0, metavar="PER_S", help="open loop: conversations come in by a Poisson process"
    )
    load.add_argument(
        "--concurrency", type=int, default=0, help="closed loop: users at a time (default: the workload's)"
    )
    load.add_argument(
        "--duration", "--test-duration", type=float, default=0.0, metavar="S", help="begin nothing new after S seconds"
    )
    load.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of one request (default %(default)s)")
    load.add_argument(
        "--warmup", type=float, default=0.0, metavar="S", help="requests begun in the first S seconds are not counted"
    )
    load.add_argument(
        "--settle", type=float, default=1.0, metavar="S", help="pause between two stages (default %(default)s)"
    )
    load.add_argument(
        "--slo-ttft",
        "--max-ttft",
        type=float,
        metavar="S",
        help="target for the first token: counted, and steers the ramp",
    )
    load.add_argument(
        "--start-users", type=int, default=0, help="ramp: begin with so many users (needs --max-users and --slo-ttft)"
    )
    load.add_argument("--max-users", type=int, default=0, help="ramp: add users up to so many while the target is kept")
    load.add_argument(
        "--assessment-period",
        type=float,
        default=30.0,
        metavar="S",
        help="ramp: how often it looks (default %(default)s)",
    )
    load.add_argument(
        "--repetitions", type=int, help="how often, each time with other text (default: 1; with --arms 3 turns each)"
    )
    load.add_argument(
        "--max-client-overhead", type=float, default=10.0, metavar="MS",
        help="refuse to run if this client itself takes longer to a first token (default %(default)s; 0: not measured)",
    )  # fmt: skip


def add_arms(parser: argparse.ArgumentParser) -> None:
    arms = parser.add_argument_group("arms: deployments started in turns")
    arms.add_argument(
        "--arms",
        default="",
        metavar="A,B,...",
        help="no-cache, gpu-cache, cache, pd, pd+cache, pd+adaptive, lmcache, nixl, offloading",
    )
    arms.add_argument("--topology", default="local-cpu-both", help="what all arms are made from (default %(default)s)")
    arms.add_argument(
        "--keep-up", action="store_true", help="start every arm once and keep all up, idle while it is not their turn"
    )
    arms.add_argument(
        "--arm-gpus",
        default="",
        metavar="G,G,...",
        help="each arm's own GPUs (0,1 or 0+1,2+3), for --keep-up: engines that share a GPU change each other's speed",
    )
    arms.add_argument(
        "--first-port", type=int, default=0, metavar="N", help="the arms' ports: free ones from N on (default: any)"
    )


def headers_of(args: argparse.Namespace) -> dict[str, str]:
    found = {}
    for given in args.header:
        name, equals, value = given.partition("=")
        if not equals or not name.strip():
            raise ConfigError("--header", f"{given!r} is not NAME=VALUE")
        found[name.strip()] = value
    return found


def extra_of(args: argparse.Namespace) -> dict[str, object]:
    try:
        extra = json.loads(args.extra_body)
    except json.JSONDecodeError as error:
        raise ConfigError("--extra-body", f"not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ConfigError("--extra-body", "is not a JSON object")
    return extra


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
