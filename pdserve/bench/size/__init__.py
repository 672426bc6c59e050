"""`pdserve size`: what to buy for a recorded load, by simulation; no GPU needed.

kv_bytes   what a token's KV takes, from a model's config
speeds     how fast an engine computes and loads: measured, or read from a running one
work       a plan as chunks: which parts of which prompts are the same
simulate   conversations, queues, tiers and instances in simulated time
advise     a sweep of sizes, and sentences
check      the simulation beside a real run, and its error
"""
