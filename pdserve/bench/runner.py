"""Runs one plan against one URL, with what has to be known first: the model's name, its length, how its tokenizer counts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import httpx

from pdserve.bench import text
from pdserve.bench.client import Address, StreamClient
from pdserve.bench.load import Load, Options, Outcome
from pdserve.bench.plan import Piece, Plan, Stage, single
from pdserve.bench.ramp import Ramp
from pdserve.bench.record import Record
from pdserve.bench.summary import quantile
from pdserve.errors import ConfigError, PdserveError, StartError, UpstreamError

SLACK_TOKENS = 64  # of a chat template, and of texts that do not tokenize exactly
OVERHEAD_REQUESTS = 400
OVERHEAD_MOST_USERS = 64


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says about itself. `max_len` is None where it does not."""

    url: str
    model: str
    max_len: int | None
    tokens_per_word: float
    api_key: str = ""


def ask(url: str, model: str = "", api_key: str = "", headers: dict[str, str] | None = None) -> Server:
    address = Address.of(url)
    given = {**(headers or {}), **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    with httpx.Client(base_url=address.url, headers=given, timeout=30, trust_env=False) as http:
        try:
            answer = http.get("/v1/models")
            listed = answer.json().get("data") or [] if answer.status_code == 200 else []
            if not model and not listed:
                problem = f"GET /v1/models answered {answer.status_code} and no model"
                raise ConfigError("--model", problem, f"Name the model that {address.url} serves.")
            model = model or str(listed[0]["id"])
            entry: dict[str, object] = next((m for m in listed if m.get("id") == model), {})
            counted = http.post(
                "/tokenize", json={"model": model, "prompt": text.sample(), "add_special_tokens": False}
            )
            tokens = counted.json().get("count") if counted.status_code == 200 else None
        except (httpx.HTTPError, ValueError) as error:
            raise UpstreamError(502, f"{type(error).__name__}: {error}", address.url) from error
    per_word = text.tokens_per_word(tokens) if isinstance(tokens, int) and tokens > 0 else 1.0
    length = entry.get("max_model_len")
    return Server(address.url, model, length if isinstance(length, int) and length > 0 else None, per_word, api_key)


def check_length(plan: Plan, max_len: int | None) -> None:
    longest = plan.longest()
    if max_len is not None and longest + SLACK_TOKENS > max_len:
        scale = (max_len - SLACK_TOKENS) / longest
        problem = f"{plan.workload} asks for {longest} tokens, the server takes {max_len}"
        raise ConfigError(
            "--scale", problem, f"Shrink every length, e.g. --scale {scale * 0.99:.3f}, or lower the lengths."
        )


def run(
    plan: Plan,
    server: Server,
    options: Options,
    *,
    salt: str = "",
    headers: dict[str, str] | None = None,
    ramp: Ramp | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Outcome:
    """`salt` makes this run's text different from another's with the same seed (a repetition must not hit the one before)."""

    async def inside() -> Outcome:
        async with StreamClient(server.url, server.api_key, headers) as client:
            writer = text.Writer(f"{plan.seed}{salt}", server.tokens_per_word)
            load = Load(plan, client, writer, replace(options, model=server.model), ramp=ramp, on_record=on_record)
            return await load.run()

    try:
        return asyncio.run(inside())
    except BaseExceptionGroup as group:
        raise _first(group) from group


def lag_p99(outcome: Outcome) -> float:
    """How late this client's own loop was."""
    return quantile(outcome.lag_ms, 0.99) if outcome.lag_ms else 0.0


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of several tasks' failures, the one that says most: our own sentence if there is one."""
    flat: list[BaseException] = []
    for error in group.exceptions:
        flat.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((e for e in flat if isinstance(e, PdserveError)), flat[0])


# ---- what the client itself costs ----


def overhead(users: int, bound_ms: float) -> dict[str, float]:
    """First-token time against a server that answers at once; refused above the bound."""
    users = max(1, min(users, OVERHEAD_MOST_USERS))
    sessions = [single(f"r{n}", (Piece(f"r{n}", 1000),), 16) for n in range(OVERHEAD_REQUESTS)]
    warm = [single(f"w{n}", (Piece(f"w{n}", 1000),), 16) for n in range(users * 2)]
    plan = Plan(
        "overhead",
        0,
        (Stage("warm", warm, measured=False, concurrency=users), Stage("all", sessions, concurrency=users)),
    )
    with _instant_server() as url:
        outcome = run(plan, Server(url, "instant", None, 1.0), Options("instant", timeout=30))
    records = [r for r in outcome.records if r.phase == "measured"]
    if any(not r.ok for r in records):
        raise PdserveError(f"the instant server failed: {next(r.error for r in records if not r.ok)}")
    firsts = [r.ttft_ms or 0.0 for r in records]
    found = {"users": users, "p50_ms": quantile(firsts, 0.5), "p99_ms": quantile(firsts, 0.99)}
    found["requests_per_s"] = len(records) / max(
        1e-9, sum(s["end"] - s["begin"] for s in outcome.stages if s["measured"])
    )
    if found["p50_ms"] > bound_ms:
        problem = f"this client itself takes {found['p50_ms']:.1f} ms to a first token with {users} users (bound {bound_ms:g} ms)"
        fix = "Run it on a machine with a free core, lower --concurrency, or raise --max-client-overhead."
        raise ConfigError("--max-client-overhead", problem, fix)
    return found


@contextmanager
def _instant_server() -> Iterator[str]:
    command = [sys.executable, "-P", "-m", "pdserve.bench.instant"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise StartError("the instant server did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        process.stdout.close()
