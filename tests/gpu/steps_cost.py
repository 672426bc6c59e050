"""Steps of run_all.py about what the connector costs an engine that has no use for it."""

from __future__ import annotations

import statistics

from gpu_session import Run, results, row


def pairs(found: dict, arms: list[str], plain: str, more_is_better: bool = True) -> dict[str, tuple[float, float, float]]:
    """Of each arm: the median, the lowest and the highest of its figures by plain vLLM's beside it."""
    ratios = {}
    for arm in arms:
        each = [a / b if more_is_better else b / a for a, b in zip(found[arm], found[plain], strict=True)]
        ratios[arm] = (statistics.median(each), min(each), max(each))
    return ratios


def throughput(run: Run) -> None:
    """The two always one after the other: an engine that answers twice in a row is slower the second time, whichever it is."""
    ours, plain = run.pair()
    found = results["throughput"] = {"new": [], "new_plain": [], "cached": [], "cached_plain": []}
    fixed = list(range(70000, 70024))
    for again in range(run.rounds + 1):
        for name, engine in (("new", ours), ("new_plain", plain)):
            seeds = list(range(50000 + 100 * again, 50024 + 100 * again))
            got = engine.do("generate", seeds=seeds, n=4000, out=64)["tok_s"]
            engine.do("settle")  # what is still being stored must not slow the next one down
            if again:  # the first is a warm-up
                found[name].append(got)
    for e in (ours, plain):
        e.do("reset")
        e.do("generate", seeds=fixed, n=4000, out=64)
    for _ in range(run.rounds):
        for name, engine in (("cached", ours), ("cached_plain", plain)):
            found[name].append(engine.do("generate", seeds=fixed, n=4000, out=64)["tok_s"])
    for what, name in (("nothing to reuse", "new"), ("all in the GPU cache", "cached")):
        a, b = statistics.median(found[name]), statistics.median(found[f"{name}_plain"])
        each, low, high = pairs(found, [name], f"{name}_plain")[name]
        row(
            f"24 x 4000 + 64, {what}, tok/s",
            f"{a:.1f} of plain {b:.1f} = {a / b:.3f}; median of pairs {each:.3f} ({low:.3f} to {high:.3f}) of {run.rounds}",
        )


#: each follows another process than its own; "idle": ours, told to look nothing up and to store nothing
ARMS = ("plain", "idle", "null", "pdserve")


class Arms:
    """Plain, a connector that does nothing, ours with nothing to do, and ours."""

    def __init__(self, run: Run) -> None:
        self.ours, plain = run.pair()
        self._engines = {"plain": plain, "idle": self.ours, "null": run.started["null"], "pdserve": self.ours}
        self.found: dict[str, dict[str, list[float]]] = results.setdefault("overhead", {})

    def ask(self, arm: str, what: str, **arguments) -> dict:
        if arm in ("idle", "pdserve"):
            self.ours.do("connector", on=arm == "pdserve")
        return self._engines[arm].do(what, **arguments)

    def keep(self, what: str, arm: str, figure: float) -> None:
        self.found.setdefault(what, {}).setdefault(arm, []).append(figure)

    def show(self, what: str, name: str, more_is_better: bool = True) -> None:
        found = self.found[name]
        ratios = pairs(found, list(ARMS[1:]), "plain", more_is_better)
        said = ", ".join(f"{arm} {m:.3f} ({low:.3f} to {high:.3f})" for arm, (m, low, high) in ratios.items())
        row(f"of plain: {what}", f"{said}; plain {statistics.median(found['plain']):.2f}, {len(found['plain'])} rounds")


def overhead(run: Run) -> None:
    """All arms in turn, in the same order in each round; ratios above 1 are quicker than plain vLLM beside it."""
    arms, rounds = Arms(run), run.rounds + 1
    fixed = list(range(80000, 80024))
    for arm in ("plain", "null", "pdserve"):
        arms.ask(arm, "generate", seeds=fixed, n=4000, out=64)
    arms.ours.do("settle")
    for again in range(rounds + 1):
        for arm in ARMS:
            got = arms.ask(arm, "generate", seeds=fixed, n=4000, out=64)["tok_s"]
            if again:  # the first is a warm-up
                arms.keep("cached", arm, got)
    arms.show("24 x 4000 + 64, all in the GPU's cache, tok/s", "cached")
    for again in range(rounds):
        for n, arm in enumerate(ARMS):
            for turn in ("after another", "after itself"):
                seed = 10 * again + n + (5000 if turn == "after itself" else 0)
                gaps = arms.ask(arm, "itl", streams=8, out=100, seed=seed)
                arms.keep(f"p50 {turn}", arm, gaps["p50"])
                arms.keep(f"p99 {turn}", arm, gaps["p99"])
    for turn in ("after another", "after itself"):
        arms.show(f"between tokens of 8 streams, p50, {turn}", f"p50 {turn}", more_is_better=False)
    for again in range(rounds):
        for n, arm in enumerate(ARMS):
            first = 100000 + 1000 * again + 100 * n
            got = arms.ask(arm, "generate", seeds=list(range(first, first + 24)), n=4000, out=64)
            arms.keep("new", arm, got["tok_s"])
            if arm == "pdserve":
                arms.ours.do("settle")  # what is still being stored must not slow the next one down
    arms.show("24 x 4000 + 64, nothing to reuse, tok/s", "new")
    in_methods(arms)


def in_methods(arms: Arms) -> None:
    """The time in each of pdserve's methods."""
    arms.ask("pdserve", "watch_calls")
    for what, ask in (
        ("decoding", {"seeds": list(range(80000, 80008)), "n": 500, "out": 200}),
        ("new", {"seeds": list(range(95000, 95024)), "n": 4000, "out": 64}),
    ):
        arms.ask("pdserve", "calls")
        seconds = arms.ask("pdserve", "generate", **ask)["ms"] / 1e3
        calls = results[f"calls {what}"] = arms.ask("pdserve", "calls")
        steps = calls["scheduler build_connector_meta"][0]
        top = ", ".join(f"{name} {ms / steps * 1e3:.0f}" for name, (_, ms) in list(calls.items())[:6])
        row(
            f"in the connector, {what}, us a step",
            f"{sum(ms for _, ms in calls.values()) / steps * 1e3:.0f} of {seconds / steps * 1e6:.0f}: {top}",
        )
