"""`pdserve size`: simulates tiers and instances from a recorded load and measured speeds, and says what to buy. No GPU needed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from pdserve import output
from pdserve import target as targets
from pdserve.bench import results, workloads
from pdserve.bench.plan import Plan
from pdserve.bench.size import advise, check, kv_bytes, simulate, speeds, work
from pdserve.bench.size.advise import Advice
from pdserve.errors import ConfigError
from pdserve.topology import parse_size

EXAMPLES = """examples:
  pdserve size --measure my-1p1d --model Qwen/Qwen3-8B --save speeds.json          on a deployment that runs
  pdserve size --model Qwen/Qwen3-8B --trace traces --speeds speeds.json --slo ttft=2 --users 32
  pdserve size --kv-bytes-per-token 147456 --trace traces --speeds h200-8b --slo ttft=2 --users 16 --sizes 0,64,256,1024
  pdserve size --model demo --workload long-doc-qa --speeds speeds.json --slo ttft=1 --check res/long-doc-qa.json --arm cache
"""
SIZES = "0,16,64,256,1024"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="", help="demo, a folder with config.json, or a hub id that is on this machine"
    )
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        help="of the KV cache: auto (as the model), bfloat16, float32, fp8 (default %(default)s)",
    )
    parser.add_argument("--kv-bytes-per-token", type=int, default=0, help="instead of --model")
    what = parser.add_argument_group("load")
    what.add_argument(
        "--trace",
        type=Path,
        metavar="DIR",
        help="recorded conversations or timed requests, as `bench trace-replay` takes",
    )
    what.add_argument(
        "--workload",
        default="",
        choices=("", *workloads.NAMES),
        metavar="NAME",
        help="a workload of `bench` instead of a trace",
    )
    what.add_argument(
        "--workload-args", default="[]", metavar="JSON", help='its options, e.g. \'["--num-documents", "20"]\''
    )
    what.add_argument("--scale", type=float, default=1.0, help="multiplies every length (default %(default)s)")
    what.add_argument(
        "--max-context",
        type=int,
        default=131072,
        help="a conversation ends where it would pass this (default %(default)s)",
    )
    what.add_argument("--seed", type=int, default=0, help="of the plan (default %(default)s)")
    what.add_argument("--users", type=int, default=0, help="conversations at a time (default: the plan's)")
    what.add_argument("--conversations", type=int, default=0, help="so many of a trace (default: each once)")
    what.add_argument(
        "--duration", type=float, default=0.0, metavar="S", help="simulated seconds (default: to the end)"
    )
    how = parser.add_argument_group("engines and tiers")
    how.add_argument("--speeds", default="", metavar="FILE", help="measured speeds, or h200-8b")
    how.add_argument("--measure", metavar="NAME|URL", help="measure speeds on this deployment first")
    how.add_argument("--save", type=Path, metavar="FILE", help="write the measured speeds there")
    how.add_argument(
        "--gpu-tokens", type=int, help="KV tokens that one engine's own cache holds (default: as measured)"
    )
    how.add_argument(
        "--sizes", default=SIZES, metavar="GIB,...", help="of shared memory for KV, GiB (default %(default)s)"
    )
    how.add_argument(
        "--disk", default="", metavar="SIZE", help="a disk tier below it, e.g. 2TiB; its speed: --disk-speed"
    )
    how.add_argument("--disk-speed", default="", metavar="SIZE", help="bytes per second read from it, e.g. 3GB")
    how.add_argument(
        "--policy", default="lru", choices=sorted(simulate.POLICIES), help="what is evicted first (default %(default)s)"
    )
    how.add_argument("--chunk-tokens", type=int, default=work.WHOLE, help="tokens of a chunk (default %(default)s)")
    how.add_argument("--max-instances", type=int, default=8, help="simulate up to so many (default %(default)s)")
    how.add_argument(
        "--seqs", type=int, default=64, help="answers that one consumer writes at a time (default %(default)s)"
    )
    parser.add_argument(
        "--slo", default="ttft=2", metavar="ttft=S", help="target for the first token (default %(default)s)"
    )
    parser.add_argument(
        "--quantile", type=float, default=0.95, help="of the requests that must keep it (default %(default)s)"
    )
    parser.add_argument(
        "--check", type=Path, metavar="RESULT.json", help="a real run of the same plan: how far off is the simulation"
    )
    parser.add_argument("--instances", type=int, default=1, help="with --check: how many it had (default %(default)s)")
    parser.add_argument("--arm", default="", help="which arm of that run")
    parser.add_argument("--json", action="store_true", help="as data")


def _refuse(args: argparse.Namespace) -> None:
    """What would end in a division by zero, a simulation without end, or an answer to another question."""
    positive = ("scale", "max_context", "chunk_tokens", "max_instances", "seqs", "instances")
    not_negative = ("users", "conversations", "duration", "gpu_tokens", "kv_bytes_per_token")
    for name in (*positive, *not_negative):
        value = getattr(args, name)
        if value is not None and not (value > 0 if name in positive else value >= 0):
            word = "positive" if name in positive else "at least 0"
            raise ConfigError(f"--{name.replace('_', '-')}", f"{value:g} is not {word}")
    if not 0 < args.quantile <= 1:
        raise ConfigError("--quantile", f"{args.quantile:g} is no part of the requests", "Write it like 0.95.")
    if args.trace and args.workload not in ("", "trace-replay"):
        raise ConfigError("--trace", f"is a load, and so is --workload {args.workload}", "Give one of them.")


def main(args: argparse.Namespace) -> int:
    _refuse(args)
    bytes_per_token = args.kv_bytes_per_token or kv_bytes.per_token(_config(args.model), args.kv_dtype)
    found = _speeds(args, bytes_per_token)
    if not (args.trace or args.workload):
        return _show_speeds(found, args.json)
    plan = _plan(args)
    most = args.conversations or (sum(1 for _ in args.trace.iterdir()) if args.trace and args.trace.is_dir() else 0)
    load = work.of(plan, args.chunk_tokens, most)
    if not any(talks for measured, _, _, talks in load.stages if measured):
        raise ConfigError("--workload-args", f"leave {plan.workload} nothing to send")
    setup = _setup(args, bytes_per_token, found)
    if args.check:
        return _check(args, plan.workload, load, found, setup)
    target, sizes = _slo(args.slo), _sizes(args.sizes)
    with output.steps(len(sizes)) as bar:
        points = advise.sweep(load, found, setup, sizes, args.max_instances, target, args.quantile, bar.step)
    advice = advise.advise(points, load, setup, target, args.quantile)
    _show(args, advice, found, bytes_per_token, target)
    return 0 if advice.best else 1


def _config(name: str) -> dict[str, Any]:
    if not name:
        raise ConfigError("--model", "missing", "Give --model, or --kv-bytes-per-token.")
    from pdserve import model

    found = model.resolve(name)
    file = Path(found.source) / "config.json"
    if not file.exists():
        problem = f"{found.source}/config.json is not on this machine"
        raise ConfigError("--model", problem, "Give a folder with config.json, or --kv-bytes-per-token.")
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def _speeds(args: argparse.Namespace, bytes_per_token: int) -> speeds.Speeds:
    if args.measure:
        found = speeds.measure(targets.find_running(args.measure), bytes_per_token, args.seed)
        if args.save:
            args.save.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    elif args.speeds:
        found = speeds.read(args.speeds)
    else:
        raise ConfigError("--speeds", "missing", "Give a file, h200-8b, or --measure a deployment that runs.")
    if args.disk_speed:
        found.tiers["disk"] = speeds.Tier(bytes_per_second=float(parse_size(args.disk_speed, "--disk-speed")))
    return found


def _plan(args: argparse.Namespace) -> Plan:
    name = args.workload or "trace-replay"
    try:
        given = json.loads(args.workload_args)
    except json.JSONDecodeError as error:
        raise ConfigError("--workload-args", f"no JSON: {error}") from error
    if not isinstance(given, list):
        raise ConfigError("--workload-args", f"{args.workload_args} is no list", 'Write it like \'["--num-documents", "20"]\'.')
    words = [str(word) for word in given]
    if args.trace:
        words += ["--trace-directory", str(args.trace), "--max-context", str(args.max_context)]
    return workloads.plan_of(name, words, seed=args.seed, scale=args.scale)


def _setup(args: argparse.Namespace, bytes_per_token: int, found: speeds.Speeds) -> simulate.Setup:
    tiers = [("dram", 0)]
    if args.disk:
        if "disk" not in found.tiers:
            raise ConfigError("--disk-speed", "missing", "Say how fast the disk is read, e.g. --disk-speed 3GB.")
        tiers.append(("disk", parse_size(args.disk, "--disk") // bytes_per_token))
    return simulate.Setup(
        1, tuple(tiers), bytes_per_token, args.users, args.seqs, args.duration, args.policy, args.gpu_tokens
    )


def _slo(text: str) -> float:
    name, _, value = text.partition("=")
    try:
        seconds = float(value.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if name != "ttft" or not 0 < seconds < float("inf"):
        raise ConfigError("--slo", f"{text!r} is no target", "Write it like ttft=2 (seconds).")
    return seconds


def _sizes(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found or not all(0 <= gib < float("inf") for gib in found):
        raise ConfigError("--sizes", f"{text!r} is not a list of GiB", "Write it like 0,64,256.")
    return found


def _show_speeds(found: speeds.Speeds, as_json: bool) -> int:
    if as_json:
        return output.print_json(msgspec.to_builtins(found))
    print(found.source)
    rows = [(f"{n} tokens computed", f"{found.base + found.compute(0, n):.3f} s") for n in (1000, 10000)]
    rows += [
        (f"load from {name}", f"{t.base:.3f} s + {t.bytes_per_second / 1e9:.2f} GB/s")
        for name, t in found.tiers.items()
    ]
    rows += [("between tokens", f"{found.token * 1000:.1f} ms"), ("own cache", f"{found.gpu_tokens} tokens")]
    output.table(("what", "speed"), rows, right=("speed",))
    return 0


def _show(args: argparse.Namespace, advice: Advice, found: speeds.Speeds, bytes_per_token: int, target: float) -> None:
    if args.json:
        points = [{k: v for k, v in asdict(p).items() if k != "found"} for p in advice.points]
        facts = {
            "speeds": msgspec.to_builtins(found),
            "kv_bytes_per_token": bytes_per_token,
            "distinct_gib": advice.distinct_gib,
        }
        split = {"producers": advice.producers, "consumers": advice.consumers}
        output.print_json(
            {**facts, "points": points, "pd": split, "advice": advice.sentences, "kept": advice.best is not None}
        )
        return
    print(f"{bytes_per_token / 1024:.1f} KiB of KV per token; speeds: {found.source}")
    head = ("GiB", "instances", "hit rate", "in GPU", "TTFT p50", f"p{args.quantile * 100:g}", "kept")
    rows = [
        (f"{p.gib:g}", p.instances, f"{p.hit_rate:.1%}", f"{p.gpu_rate:.1%}", f"{p.ttft_p50:.2f} s", f"{p.ttft:.2f} s",
         "yes" if p.kept(target) else "no")
        for p in advice.points
    ]  # fmt: skip
    output.table(head, rows, right=head[:-1])
    for sentence in advice.sentences:
        print(sentence)
    print(
        f"Split into producers and consumers: {advice.producers}:{advice.consumers}, each at most {advise.BUSY:.0%} busy."
    )


def _check(args: argparse.Namespace, workload: str, load: work.Work, found: speeds.Speeds, setup: simulate.Setup) -> int:
    """The sizes' first entry is what the real run had."""
    result = results.read(args.check)
    if result.workload != workload:
        raise ConfigError("--check", f"{args.check} is a run of {result.workload}, simulated is {workload}")
    if args.arm not in result.arms:
        raise ConfigError("--arm", f"{args.arm!r} is not in {args.check}", f"It has: {', '.join(result.arms)}.")
    tokens = int(_sizes(args.sizes)[0] * simulate.GIB / setup.kv_bytes)
    one = replace(setup, instances=args.instances, tiers=(("dram", tokens), *setup.tiers[1:]))
    rows = check.compare(simulate.simulate(load, found, one), result, args.arm)
    if args.json:
        return output.print_json([{**asdict(row), "ratio": row.ratio} for row in rows])
    cells = [(r.name, f"{r.simulated:.4g}", f"{r.measured:.4g}", f"{r.ratio:.3f}") for r in rows]
    output.table(("figure", "simulated", "measured", "ratio"), cells, right=("simulated", "measured", "ratio"))
    return 0
