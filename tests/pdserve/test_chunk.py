import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.chunk import ChunkLayout, KeyChain, root_key

LAYOUT = ChunkLayout(kind="opaque-block", kv_dtype="bfloat16", layers=30, block_tokens=128, block_bytes=98304, shards=1)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@given(tokens, tokens)
def test_keys_are_equal_exactly_as_far_as_the_prefixes_are(a, b):
    root = root_key("m", LAYOUT)
    ka, kb = KeyChain(root, 8).full(a), KeyChain(root, 8).full(b)
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    for i, (x, y) in enumerate(zip(ka, kb, strict=False)):
        assert (x == y) == ((i + 1) * 8 <= common)


@given(tokens, st.integers(0, 60))
def test_growing_a_sequence_gives_the_same_keys_as_hashing_it_whole(a, cut):
    root = root_key("m", LAYOUT)
    grown = KeyChain(root, 8)
    grown.full(a[:cut])
    assert grown.full(a) == KeyChain(root, 8).full(a)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_a_tail_never_equals_a_full_chunk_or_another_tail(a):
    root = root_key("m", LAYOUT)
    seen = {}
    for n in range(1, len(a) + 1):
        chain = KeyChain(root, 8)
        key = chain.tail(a[:n]) or chain.full(a[:n])[-1]
        assert seen.setdefault(key, n) == n


def test_everything_that_changes_the_numbers_changes_the_root():
    base = dict(kind="opaque-block", kv_dtype="bfloat16", layers=30, block_tokens=128, block_bytes=98304, shards=1)
    roots = {
        root_key("m", LAYOUT),
        root_key("m2", LAYOUT),
        root_key("m", LAYOUT, lora="a"),
        root_key("m", LAYOUT, cache_salt="a"),
        root_key("m", LAYOUT, lora="a", cache_salt="b"),
        root_key("m", LAYOUT, lora="ab"),
        root_key("m", LAYOUT, cache_salt="ab"),
    }
    for field, other in dict(
        kind="canonical", kv_dtype="float32", layers=31, block_tokens=64, block_bytes=1, shards=2, detail="amx"
    ).items():
        roots.add(root_key("m", ChunkLayout(**{**base, field: other})))
    assert len(roots) == 14


def test_media_content_is_part_of_the_keys_it_touches_and_of_all_that_follow():
    root, ids = root_key("m", LAYOUT), list(range(32))
    one, two = (KeyChain(root, 8, [(name, 10, 4)]).full(ids) for name in ("cat", "dog"))
    assert one[0] == two[0]
    assert all(a != b for a, b in zip(one[1:], two[1:], strict=True))


def test_keys_do_not_depend_on_the_process_or_its_hash_seed():
    code = """
from pdserve.chunk import ChunkLayout, KeyChain, root_key
layout = ChunkLayout(kind="opaque-block", kv_dtype="bfloat16", layers=30, block_tokens=128, block_bytes=98304, shards=1)
print(KeyChain(root_key("m", layout, "lora", "salt"), 4).full(list(range(12)))[-1].hex())
"""
    out = set()
    for seed in ("0", "1", "random"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60
        )
        out.add(run.stdout)
    assert len(out) == 1


def test_chunk_tokens_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        KeyChain(b"", 0)


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (128, 1), (129, 2), (256, 2)])
def test_shard_bytes_counts_whole_blocks(n, blocks):
    assert LAYOUT.shard_bytes(n) == blocks * 98304 * 30
