"""One workload, against one server or in arms: from the words of the command to a result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pdserve import target as targets
from pdserve.bench import cli, compare, facts, records_of, results, runner, show, workloads
from pdserve.bench.load import Options, Outcome
from pdserve.bench.plan import Plan
from pdserve.bench.progress import Progress
from pdserve.bench.ramp import Ramp
from pdserve.bench.results import Result, Run
from pdserve.bench.runner import Server
from pdserve.bench.summary import phases, quantile
from pdserve.errors import ConfigError

LATE_SHARE = 0.02  # a client that is late by less than this part of the median first token changes no verdict
CONTEXT_SHARE = 0.97


def main(args: argparse.Namespace) -> int:
    check(args)
    if args.arms:
        from pdserve.bench import arms

        return finish(args, arms.run(args))
    found = targets.find_running(args.target)
    server = runner.ask(found.url, args.model, args.api_key, cli.headers_of(args))
    result = begin(args, server)
    for repetition in range(1, (args.repetitions or 1) + 1):
        measure(args, server, result, "", repetition)
    return finish(args, result)


def check(args: argparse.Namespace) -> None:
    if args.scale <= 0 or args.timeout <= 0 or (args.repetitions is not None and args.repetitions < 1):
        raise ConfigError("--scale, --timeout, --repetitions", "must be positive")
    if args.arms and args.target:
        raise ConfigError(
            "--arms", f"starts deployments of its own, but {args.target} was named", "Name one or the other."
        )
    if bool(args.start_users) != bool(args.max_users) or (args.start_users and not args.slo_ttft):
        raise ConfigError("--start-users", "a ramp needs all three", "Give --start-users, --max-users and --slo-ttft.")
    if args.start_users > args.max_users:
        raise ConfigError("--start-users", f"{args.start_users} is more than --max-users {args.max_users}")
    if args.start_users and not args.duration:
        raise ConfigError("--duration", "missing", "A ramp needs to know when to end.")
    if args.start_users and args.rate:
        raise ConfigError("--rate", "an open loop has no users to ramp", "Give either --rate or --start-users.")
    cli.headers_of(args)
    cli.extra_of(args)
    results.check_folder(args.out)


def make_plan(args: argparse.Namespace, server: Server) -> Plan:
    """The plan that fits the server; where the workload can cut conversations at the context's end, it does."""
    given = dict(vars(args))
    if given.get("max_context") == 0 and server.max_len:
        given["max_context"] = int(server.max_len * CONTEXT_SHARE) - runner.SLACK_TOKENS
    plan = workloads.make(args.word, argparse.Namespace(**given))
    runner.check_length(plan, server.max_len)
    if (args.rate or args.concurrency or args.start_users) and all(s.given for s in plan.stages if s.measured):
        problem = f"{plan.workload} says itself when each request comes in"
        raise ConfigError("--rate, --concurrency, --start-users", problem, "Leave them out; its own options say how much.")
    return plan


def most_users(args: argparse.Namespace, server: Server) -> int:
    """At most so many requests at a time, as far as the plan says."""
    return _users(args, make_plan(args, server))


def _users(args: argparse.Namespace, plan: Plan) -> int:
    return int(args.concurrency or args.max_users or max(stage.concurrency for stage in plan.stages))


def begin(args: argparse.Namespace, server: Server) -> Result:
    """The result's head, and the check of the client itself."""
    plan = make_plan(args, server)
    overhead = runner.overhead(_users(args, plan), args.max_client_overhead) if args.max_client_overhead else {}
    hidden = ("api_key", "header", "target", "json", "quiet", "out", "name")
    parameters = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in hidden}
    return Result(
        workload=args.word, command=facts.command(), started=results.now(), seed=args.seed,
        parameters=parameters | dict(plan.parameters), timeout=args.timeout, slo=args.slo_ttft,
        machine=facts.machine(), versions=facts.versions(), overhead=overhead,
    )  # fmt: skip


def measure(
    args: argparse.Namespace,
    server: Server,
    result: Result,
    arm: str = "",
    repetition: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Run:
    """One repetition against one server, added to the result. Repetitions differ in their text, arms of one repetition do not."""
    plan = make_plan(args, server)
    options = Options(
        server.model, args.seed, chat=plan.chat if args.endpoint is None else args.endpoint == "chat", timeout=args.timeout,
        rate=args.rate, concurrency=args.concurrency, duration=args.duration, warmup=args.warmup, settle=args.settle,
        ignore_eos=not args.no_ignore_eos, extra=cli.extra_of(args),
    )  # fmt: skip
    ramp = Ramp(args.start_users, args.max_users, args.slo_ttft, args.assessment_period) if args.start_users else None
    label = " ".join([args.word, *filter(None, [arm]), *([f"#{repetition}"] if repetition > 1 or arm else [])])
    progress = Progress(sys.stderr, label, args.quiet)
    outcome = runner.run(
        plan,
        server,
        options,
        salt=f"/{args.word}/{repetition}",
        headers=cli.headers_of(args),
        ramp=ramp,
        on_record=progress.on_record,
    )
    progress.end()
    records_of.fill_in(server, outcome.records)
    return add(result, outcome, arm, repetition, about or {})


def add(result: Result, outcome: Outcome, arm: str, repetition: int, about: Mapping[str, Any]) -> Run:
    run = Run(
        arm=arm, repetition=repetition, seconds=outcome.seconds, stages=outcome.stages, facts=dict(about),
        lag_p99_ms=runner.lag_p99(outcome),
        periods=outcome.ramp.periods if outcome.ramp else [], carried_users=outcome.ramp.carried if outcome.ramp else None,
    )  # fmt: skip
    result.runs.append(run)
    result.records += [msgspec.structs.replace(r, arm=arm, repetition=repetition) for r in outcome.records]
    return run


def finish(args: argparse.Namespace, result: Result) -> int:
    """Judges the run itself, shows it, writes it. 1 if the client was too late for the figures to be believed."""
    late = too_late(result, args.max_client_overhead)
    result.notes += [*compare.idle_caches(result), *late]
    counts = phases(result.records)
    if not counts.get("measured"):
        result.notes.append("Nothing was measured: there was nothing to send, or --warmup and --duration left nothing of it.")
    if left := {k: v for k, v in counts.items() if k != "measured"}:
        said = ", ".join(f"{n} {name}" for name, n in left.items())
        result.notes.append(f"Not in the figures: {said} requests; {counts.get('measured', 0)} were measured.")
    show.result(result, as_json=args.json)
    if args.out:
        from pdserve.bench.report import page

        files = results.write(result, args.out, args.name)
        files.append(page.write(args.out))
        cli.say("wrote " + ", ".join(str(file) for file in files))
    failed = all(not r.ok for r in result.records if r.phase == "measured")
    return 1 if late or failed else 0


def too_late(result: Result, bound_ms: float) -> list[str]:
    """A sentence if the client itself was so late that the figures say something of it; none with a bound of 0."""
    firsts = [r.ttft_ms for r in result.records if r.phase == "measured" and r.ttft_ms is not None]
    if not firsts or not bound_ms:
        return []
    allowed = max(bound_ms, LATE_SHARE * quantile(firsts, 0.5))
    worst = max((run.lag_p99_ms for run in result.runs), default=0.0)
    if worst <= allowed:
        return []
    return [f"The client itself was late by {worst:.1f} ms (p99; bound {allowed:.1f}): do not believe these figures."]
