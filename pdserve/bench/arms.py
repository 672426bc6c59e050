"""The same load against several deployments in turns: A B C, A B C, ... Each is started from one topology by changing its KV strategy.

On a machine that holds one deployment at a time each turn starts and stops its own: caches are empty then, and what the
machine does in the meantime falls on all alike. --keep-up starts all once instead; idle ones cost memory, hardly time. The
text differs from repetition to repetition, so that no turn hits what another left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
#: what threads of `up` do beside starting processes: msgspec's first look at a type crashes if another thread has its own
_ONE_AT_A_TIME = threading.Lock()
WARM_PROMPTS = (7, 300)  # tokens; the first requests of an engine compile and allocate
WARM_TIMEOUT = 300.0


def run(args: argparse.Namespace) -> Result:
    args.repetitions = args.repetitions or TURNS
    base = read_base(args.topology)
    names, notes = usable(variants.parse(args.arms), base)
    for name in names:
        placed(name, base, args)  # what is wrong with it is said before anything starts
    with tempfile.TemporaryDirectory(prefix="pdserve-arms-") as folder:
        turns = _kept_up if args.keep_up else _in_turns
        result = turns(args, names, base, Path(folder))
    how = (
        "all were up, idle while it was not their turn"
        if args.keep_up
        else "each turn started and stopped its deployment"
    )
    result.notes += [*notes, f"Turns: {' '.join(names)}, {args.repetitions} round(s); {how}.", *remarks(names, base)]
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


def placed(arm: str, base: Raw, args: argparse.Namespace) -> Raw:
    """What the arm is made from: on GPUs of its own, where `--arm-gpus` names them."""
    gpus = variants.places(getattr(args, "arm_gpus", ""), variants.parse(args.arms))
    return variants.on_gpus(base, gpus[arm]) if gpus else base


def remarks(names: list[str], base: Raw) -> list[str]:
    on_cpu = (base.get("engine") or {}).get("device") == "cpu"
    return [remark for name in names for remark in others.remarks(name, on_cpu)]


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
    with up(names, base, folder, args) as (started, problems):
        result = one.begin(args, next(iter(started.values()))[0])
        result.notes += problems
        for repetition in range(1, args.repetitions + 1):
            for name, (server, raw) in started.items():
                one.measure(args, server, result, name, repetition, {"topology": raw})
    return result


Up = dict[str, tuple[Server, Raw]]


@contextlib.contextmanager
def up(names: list[str], base: Raw, folder: Path, args: argparse.Namespace) -> Iterator[tuple[Up, list[str]]]:
    """All arms at once, started side by side; and a sentence for each that could not be. All are stopped at the end."""
    port = ports(getattr(args, "first_port", 0))
    held = {name: deployment(name, base, folder, args, port) for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
        begun = {name: pool.submit(one_up.__enter__) for name, one_up in held.items()}
        try:
            started, problems = _started(begun)
            yield started, problems
        finally:
            for name, future in begun.items():
                if not future.done():  # given up while it was coming up: what waits for it then sees it fail
                    targets.stop(variants.name_of(name, base))
            wait([pool.submit(_stopped, held[name], begun[name]) for name in names])


def _started(begun: dict[str, Future[tuple[Server, Raw]]]) -> tuple[Up, list[str]]:
    started: Up = {}
    problems = []
    for name, future in begun.items():
        try:
            started[name] = future.result()
        except (PdserveError, OSError) as error:
            problems.append(f"{name} could not be started and was left out: {error}")
            cli.say(problems[-1])
    if not started:
        raise PdserveError("; ".join(problems))
    return started, problems


def _stopped(held: contextlib.AbstractContextManager[object], begun: Future[tuple[Server, Raw]]) -> None:
    """Also one that was still coming up when the others were given up. What could not start has cleaned up by itself."""
    if begun.exception() is None:
        held.__exit__(None, None, None)


def ports(first: int) -> variants.PortMaker:
    """Free ports: any, or from `first` on (below the range that the system takes ports from, they stay free until they are used)."""
    if not first:
        return targets.free_port
    numbers = itertools.count(first)
    return lambda: next(n for n in numbers if _is_free(n))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextlib.contextmanager
def deployment(
    arm: str, base: Raw, folder: Path, args: argparse.Namespace, port: variants.PortMaker = targets.free_port
) -> Iterator[tuple[Server, Raw]]:
    """One arm, up and warm; stopped, with what it wrote to disk, at the end."""
    with _ONE_AT_A_TIME:
        service_port, http_port = port(), port()
        raw = variants.make(arm, placed(arm, base, args), port, service_port)
        extra = others.environment(arm)
        raw["engine"]["env"] = {**(raw["engine"].get("env") or {}), **extra}
        file = folder / f"{raw['name']}.yaml"
        file.write_text(yaml.safe_dump(raw, sort_keys=False))
        top = topology.load(file)
        size = parse_size(base["cache"]["size"], "cache.size") if base.get("cache") else 0
    cli.say(f"starting {arm}")
    with contextlib.ExitStack() as stack:
        if others.has_server(arm, raw):
            stack.enter_context(others.service(size, service_port, http_port, folder / f"{raw['name']}-service.log"))
        try:
            targets.launch(file)
            assert top.proxy is not None
            with _ONE_AT_A_TIME:
                server = runner.ask(top.proxy.url, args.model)
                warm(server, len(top.instances))
            if fault := others.fault(arm, env.run_root() / top.name / "logs"):
                raise PdserveError(fault)
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
