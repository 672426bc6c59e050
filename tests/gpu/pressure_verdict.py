"""What the pressure check makes of its answers: equal, different at a near tie, or wrong. Pure.

Two engines that compute the same in another order differ by rounding, and where two tokens are as good as tied the other one
comes out. A wrong block is no such thing: it moves the logprobs of all that follows. So both are looked at: the gap between the
two tokens where answers part, and how far the logprobs of the tokens before it have moved. In float32 with float32's own products
rounding moves them by at most 6e-5 (SmolLM2-135M, 3340 logprobs, a prompt at once or in pieces); with TF32 (10 bits of mantissa,
what Triton takes for float32 unless it is told) by 1e-3, and up to 1e-2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NEAR = 1e-3  # nats: more than ten times what float32 does
FAR = 1e9  # a token that is not among the other engine's best

#: an answer: {"turn", "prompt", "tokens", "top"}; top: for each token [[id, logprob], ...] of the best ones and of itself


@dataclass
class Difference:
    """Where an answer parts from the wanted one. `gap`: the larger of what either engine put between the two tokens."""

    turn: str
    prompt: int
    position: int
    wanted: int
    found: int
    logprobs_there: dict[str, list[float]]
    gap: float


def compare(wanted: dict, found: dict) -> tuple[float, Difference | None]:
    """(how far the logprobs moved while the answers were the same, where they part)."""
    moved, pairs = 0.0, zip(wanted["tokens"], found["tokens"], strict=True)
    for i, (a, b) in enumerate(pairs):
        there, here = (dict(map(tuple, answer["top"][i])) for answer in (wanted, found))
        if a != b:
            gaps = [abs(top[a] - top[b]) if a in top and b in top else FAR for top in (there, here)]
            lines = {
                "wanted's": [there.get(a, -FAR), there.get(b, -FAR)],
                "found's": [here.get(a, -FAR), here.get(b, -FAR)],
            }
            return moved, Difference(found["turn"], found["prompt"], i, a, b, lines, max(gaps))
        moved = max(moved, abs(there[a] - here[a]))
    return moved, None


def arm(wanted: dict[int, dict], answers: list[dict]) -> dict[str, Any]:
    """What one engine under pressure gave beside plain vLLM's answers."""
    moved, differences = 0.0, []
    for found in answers:
        there, difference = compare(wanted[found["prompt"]], found)
        moved = max(moved, there)
        differences += [difference] if difference else []
    return {
        "answers": len(answers), "equal": len(answers) - len(differences), "moved": moved,
        "near ties": sum(d.gap < NEAR for d in differences), "different": [asdict(d) for d in differences],
    }  # fmt: skip


def judge(plain: list[dict], ours: dict, control: dict) -> tuple[dict, list[str]]:
    """What is shown, and what is wrong."""
    wanted = {answer["prompt"]: answer for answer in plain}
    arms, counts, wrong = {}, {}, []
    for name, found in (("ours", ours), ("control", control)):
        arms[name] = shown = arm(wanted, found["answers"])
        counts[name] = {k: v for k, v in found.items() if k not in ("answers", "left", "blocks held when refused")}
        says = f"{name}: " if name != "ours" else ""
        wrong += [f"{says}{k} are left: {n}" for k, n in found["left"].items() if n]
        some = ("preempted", "aborted", "resets", "running when reset", "loads")
        wrong += [f"{says}no {k}" for k in some if found.get(k) == 0]
        if refused := found["resets refused by vLLM"]:  # all that could end has ended: what is held now is a leak
            wrong.append(f"{says}{refused} resets were refused, blocks held by {found['blocks held when refused']}")
        if shown["answers"] != 3 * len(wanted):
            wrong.append(f"{says}{shown['answers']} answers of {3 * len(wanted)} that were asked for")
        if far := shown["answers"] - shown["equal"] - shown["near ties"]:
            wrong.append(f"{says}{far} answers are not plain vLLM's, and not for a near tie")
        if shown["moved"] >= NEAR:
            wrong.append(f"{says}logprobs moved by {shown['moved']:.1e} before any answer parted")
    if arms["ours"]["near ties"] and not arms["control"]["near ties"]:
        wrong.append(f"{arms['ours']['near ties']} answers differ at near ties, none of the control's does")
    if ours["loads that failed"]:
        wrong.append("a load failed")
    beside = arms["control"]
    what = ", ".join(f"{k} {v}" for k, v in counts["ours"].items())
    what += f"; near ties {arms['ours']['near ties']}, moved {arms['ours']['moved']:.1e}"
    what += f"; control: {beside['equal']} of {beside['answers']}, near ties {beside['near ties']}, moved {beside['moved']:.1e}"
    return {
        **arms["ours"],
        **counts["ours"],
        "left": ours["left"],
        "control": {**beside, **counts["control"]},
        "what": what,
    }, wrong
