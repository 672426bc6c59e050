"""The same load against several deployments in turns: A B C, A B C, ... Each is started from one topology by changing its KV strategy.

On a machine that holds one deployment at a time each turn starts and stops its own: caches are empty then, and what the
machine does in the meantime falls on all alike. --keep-up starts all once instead; idle ones cost memory, hardly time. The
text differs from repetition to repetition, so that no turn hits what another left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from pdserve import env, topology
from pdserve import target as targets
from pdserve.bench import cli, one, others, runner, variants
from pdserve.bench.results import Result
from pdserve.bench.runner import Server
from pdserve.bench.variants import Raw
from pdserve.errors import ConfigError, PdserveError
from pdserve.openai_client import Client
from pdserve.topology import parse_size

TURNS = 3
WARM_PROMPTS = (7, 300)  # tokens; the first requests of an engine compile and allocate
WARM_TIMEOUT = 300.0


def run(args: argparse.Namespace) -> Result:
    args.repetitions = args.repetitions or TURNS
    base = read_base(args.topology)
    names, notes = usable(variants.parse(args.arms), base)
    with tempfile.TemporaryDirectory(prefix="pdserve-arms-") as folder:
        turns = _kept_up if args.keep_up else _in_turns
        result = turns(args, names, base, Path(folder))
    how = (
        "all were up, idle while it was not their turn"
        if args.keep_up
        else "each turn started and stopped its deployment"
    )
    result.notes += [*notes, f"Turns: {' '.join(names)}, {args.repetitions} round(s); {how}.", *_remarks(names)]
    return result


def read_base(name: str) -> Raw:
    """The topology's file as data, with a local model's path made absolute."""
    top = topology.load(name)
    raw: Raw = yaml.safe_load(Path(top.source).read_text())
    local = Path(top.source).parent / str(raw["model"])
    if local.is_dir():
        raw["model"] = str(local)
    return raw


def usable(names: list[str], base: Raw) -> tuple[list[str], list[str]]:
    """The arms that can be started here, and a sentence for each that cannot."""
    problems = {name: variants.why_not(name, base) or others.missing(name) for name in names}
    notes = [f"Left out: {problem}" for problem in problems.values() if problem]
    for note in notes:
        cli.say(note)
    left = [name for name in names if not problems[name]]
    if not left:
        raise ConfigError("--arms", "none of them can be started here", " ".join(notes))
    return left, notes


def _remarks(names: list[str]) -> list[str]:
    return [remark for name in names for remark in others.remarks(name)]


def _in_turns(args: argparse.Namespace, names: list[str], base: Raw, folder: Path) -> Result:
    result: Result | None = None
    failed: dict[str, str] = {}
    for repetition in range(1, args.repetitions + 1):
        for name in names:
            if name in failed:
                continue
            try:
                with deployment(name, base, folder, args) as (server, raw):
                    result = result or one.begin(args, server)
                    one.measure(args, server, result, name, repetition, {"topology": raw})
            except (PdserveError, OSError) as error:
                failed[name] = f"{name} failed in turn {repetition} and was left out from then on: {error}"
                cli.say(failed[name])
    if result is None:
        raise PdserveError("; ".join(failed.values()))
    result.notes += list(failed.values())
    return result


def _kept_up(args: argparse.Namespace, names: list[str], base: Raw, folder: Path) -> Result:
    with contextlib.ExitStack() as stack:
        up = {name: stack.enter_context(deployment(name, base, folder, args)) for name in names}
        result = one.begin(args, next(iter(up.values()))[0])
        for repetition in range(1, args.repetitions + 1):
            for name, (server, raw) in up.items():
                one.measure(args, server, result, name, repetition, {"topology": raw})
    return result


@contextlib.contextmanager
def deployment(arm: str, base: Raw, folder: Path, args: argparse.Namespace) -> Iterator[tuple[Server, Raw]]:
    """One arm, up and warm; stopped, with what it wrote to disk, at the end."""
    service_port, http_port = targets.free_port(), targets.free_port()
    raw = variants.make(arm, base, targets.free_port, service_port)
    extra = others.environment(arm)
    raw["engine"]["env"] = {**(raw["engine"].get("env") or {}), **extra}
    file = folder / f"{raw['name']}.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    top = topology.load(file)
    size = parse_size(base["cache"]["size"], "cache.size") if base.get("cache") else 0
    cli.say(f"starting {arm}")
    with others.service(arm, size, service_port, http_port, folder / f"{raw['name']}-service.log"):
        try:
            targets.launch(file)
            assert top.proxy is not None
            server = runner.ask(top.proxy.url, args.model)
            warm(server, len(top.instances))
            yield server, raw
        finally:
            targets.stop(top.name)
            shutil.rmtree(
                env.run_root() / top.name / "kv", ignore_errors=True
            )  # the next turn begins with an empty disk


def warm(server: Server, engines: int) -> None:
    """A few requests to every engine, whichever the proxy gives them to."""
    with Client(server.url, model=server.model, timeout=WARM_TIMEOUT) as client:
        for n in range(2 * engines):
            for tokens in WARM_PROMPTS:
                client.complete(" ".join(f"warm{n}" for _ in range(tokens // 3 + 1)), max_tokens=2)
