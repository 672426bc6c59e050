"""`pdserve bench`: the workloads that users of KV caches know, against any OpenAI server, in honest arms.

workloads/   what is asked: a plan of conversations, made from a seed, without I/O
load         how it is asked: open or closed loop, a ramp of users, latency from the intended start
arms         of whom: one topology started with different KV strategies, in turns
summary, stats, compare, report   what came of it
"""

from __future__ import annotations

from pdserve.bench.cli import EXAMPLES, add_arguments, default_words, main

__all__ = ["EXAMPLES", "add_arguments", "default_words", "main"]
