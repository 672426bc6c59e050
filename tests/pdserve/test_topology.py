"""The topology YAML: what is accepted, and that every mistake is one line with the key path, the value and the fix."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pdserve import topology
from pdserve.errors import ConfigError

GOOD = """
name: local-cpu
model: demo
engine: {device: cpu, dtype: bfloat16, max_model_len: 4096, kv_cache_space_gib: 1}
prefill: [{port: 8100, cpus: "0"}]
decode: [{port: 8200, cpus: 1, max_model_len: 2048}]
cache: {size: 2GiB}
"""
GPU = """
name: gpu
model: org/model
engine: {dtype: bfloat16, tensor_parallel_size: 2}
both: [{port: 8100, gpus: [0, 1]}, {port: 8101, gpus: [2, 3]}]
cache: {size: 1GiB}
"""


def test_sections_are_merged_into_each_instance() -> None:
    top = topology.parse(GOOD)
    prefill, decode = top.instances
    assert (prefill.name, prefill.key, prefill.url) == ("prefill-0", "prefill[0]", "http://127.0.0.1:8100")
    assert (prefill.engine.max_model_len, decode.engine.max_model_len) == (4096, 2048)
    assert (prefill.cpus, decode.cpus) == ("0", "1")
    assert top.cache is not None
    assert top.cache.size == 2 << 30
    assert top.proxy is not None
    assert (top.proxy.port, top.proxy.policy) == (8000, "round_robin")
    assert top.of("decode") == (decode,)


def test_environments_of_engine_and_instance_add_up() -> None:
    text = GOOD.replace("dtype: bfloat16", 'dtype: bfloat16, env: {A: "1", B: "1"}').replace("cpus: 1", 'env: {B: "2"}')
    assert topology.parse(text).of("decode")[0].engine.env == {"A": "1", "B": "2"}


def test_only_plain_engines_need_neither_cache_nor_proxy() -> None:
    top = topology.parse("name: ref\nmodel: demo\nengine: {device: cpu}\nplain: [{port: 8300}]\n")
    assert top.cache is None
    assert top.proxy is None
    assert not top.uses_cache(top.instances[0])


def test_proxy_null_means_none() -> None:
    assert topology.parse(GOOD + "proxy: null\n").proxy is None


@pytest.mark.parametrize("name", sorted(topology.shipped_topologies()))
def test_shipped_topologies_are_valid_and_named_like_their_file(name: str) -> None:
    assert topology.load(name).name == name


def test_the_four_topologies_are_shipped() -> None:
    assert set(topology.shipped_topologies()) >= {"local-cpu", "local-cpu-both", "gpu-1p1d", "gpu-2p2d-tp2"}


CASES = [
    # replaced, by, start of the message, something from the fix
    ("8200", "8100", "decode[0].port: 8100 is used by prefill[0]", "port of its own"),
    ("8200", "8000", "proxy.port: 8000 is used by decode[0]", ""),
    ("8200", "8080", "cache.admin_port: 8080 is used by decode[0]", ""),
    ("8200", "eight", "decode[0].port: 'eight' is text", "Give an integer"),
    ("8200", "'8200'", "decode[0].port: '8200' is text", "Give an integer"),
    ("8200", "true", "decode[0].port: True is true or false", "Give an integer"),
    ("8200", "70000", "decode[0].port: 70000 is out of range", "<= 65535"),
    ("8200", "", "decode[0].port: None is empty", "Give an integer"),
    ("{port: 8200,", "{", "decode[0].port: missing", "e.g. port: 8100"),
    ("cpus: 1", "cpu: 1", "decode[0].cpu: unknown key", "Did you mean 'cpus'?"),
    ("dtype:", "dtyp:", "engine.dtyp: unknown key", "Did you mean 'dtype'?"),
    ("decode:", "decoder:", "decoder: unknown key", "Did you mean 'decode'?"),
    ("size: 2GiB", "size: 2GiB, zzz: 1", "cache.zzz: unknown key", "Known keys: size"),
    ("model: demo", "model: demo\nmax_model_len: 5", "max_model_len: unknown key", "belongs under engine"),
    ("model: demo", "model: demo\nmodel: x", "model: given twice", "Keep one"),
    ("model: demo", "", "model: missing", "Give demo"),
    ("model: demo", "model: 3", "model: 3 is a number", "quotes"),
    ("bfloat16", "bflot16", "engine.dtype: 'bflot16' is not known", "Did you mean 'bfloat16'?"),
    ("device: cpu", "device: tpu", "engine.device: 'tpu' is not known", "Known: cpu, cuda"),
    ("cache:", "proxy: {policy: round}\ncache:", "proxy.policy: 'round' is not known", "round_robin"),
    ("4096", "0", "engine.max_model_len: 0 is out of range", ">= 1"),
    ("2GiB", "plenty", "cache.size: 'plenty' is not a size", "2GiB or 512MiB"),
    ("2GiB", "1KiB", "cache.size: 1024 bytes is too small", "64MiB"),
    ("2GiB", "2GiB, chunk_tokens: 20", "cache.chunk_tokens: 20 is out of range", "multiple of 16"),
    ("2GiB", "2GiB, chunk_tokens: 64", "cache.chunk_tokens: 64 does not fit prefill[0]", "multiple of 128"),
    ("2GiB", "2GiB, disk: {size: 9KiB}", "cache.disk.size: 9216 bytes is too small", "64MiB"),
    ("2GiB", "2GiB, disk: {sise: 9GiB}", "cache.disk.sise: unknown key", "Did you mean 'size'?"),
    ("2GiB", "2GiB, disk: {path: /x}", "cache.disk.size: missing", "2GiB"),
    ("2GiB", "2GiB, disk: {size: 9GiB, write: on-evct}", "cache.disk.write: 'on-evct' is not known", "'on-evict'"),
    ("2GiB", "2GiB, tiers: [localhost]", "cache.tiers[0]: 'localhost' is not a URL", "redis://"),
    ("cache: {size: 2GiB}", "", "cache: missing", "Add one"),
    ('[{port: 8100, cpus: "0"}]', "[]", "prefill: no producer is listed", "both"),
    ("[{port: 8200, cpus: 1, max_model_len: 2048}]", "[]", "decode: no consumer is listed", "both"),
    ('[{port: 8100, cpus: "0"}]', "{port: 8100}", "prefill: {'port': 8100} is a mapping", "Give a list"),
    ('{port: 8100, cpus: "0"}', "8100", "prefill[0]: 8100 is a number", "mapping"),
    ('cpus: "0"', "env: {A: 1}", "prefill[0].env.A: 1 is a number", "quotes"),
    ('cpus: "0"', "env: {1: a}", "1: this key in line 5 is not text", "quotes"),
    ('cpus: "0"', "extra_args: [--port=3]", "prefill[0].extra_args: '--port=3' is set by pdserve", "Remove it"),
    ('cpus: "0"', "gpus: [0]", "prefill[0].gpus: [0] with device cpu", "device: cuda"),
    ('cpus: "0"', "cpus: a-b", "prefill[0].cpus: 'a-b' is not a list of cores", "0-3"),
    ('cpus: "0"', 'cpus: "0|1"', "prefill[0].cpus: '0|1' is for 2 rank(s)", "each rank"),
    ('cpus: "0"', "second_context: true", "prefill[0].second_context: has no meaning", "Remove it"),
    ('cpus: "0"', "load_share: 0.5", "prefill[0].load_share: has no meaning", "Remove it"),
    ('cpus: "0"', "load_share: 0", "prefill[0].load_share: ", "0.1"),
    ('cpus: "0"', "gpu_memory_utilization: 0.5", "prefill[0].gpu_memory_utilization: has no meaning", "kv_cache_space"),
    ('cpus: "0"', "kind: fake", "engine.kind: engines of kinds fake, vllm", "one kind"),
    ("name: local-cpu", "name: Local CPU", "name: 'Local CPU' is not a name", "small letters"),
    ("name: local-cpu", "name: ../etc", "name: '../etc' is not a name", "small letters"),
]


@pytest.mark.parametrize(("old", "new", "start", "fix"), CASES, ids=[case[2] for case in CASES])
def test_each_mistake_is_named(old: str, new: str, start: str, fix: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        topology.parse(GOOD.replace(old, new, 1))
    message = str(caught.value)
    assert message.startswith(start)
    assert fix in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


GPU_CASES = [
    ("gpus: [2, 3]", "gpus: [1, 2]", "both[1].gpus: 1 is used by both[0]"),
    ("gpus: [2, 3]", "gpus: [2]", "both[1].gpus: [2] is 1, but tensor_parallel_size is 2"),
    (
        "gpus: [2, 3]",
        "gpus: [2, 3], pipeline_parallel_size: 2",
        "both[1].gpus: [2, 3] is 2, but tensor_parallel_size is 2 and pipeline_parallel_size 2",
    ),
    ("gpus: [2, 3]", "device: cpu, pipeline_parallel_size: 2", "both[1].pipeline_parallel_size: with device cpu"),
    ("gpus: [2, 3]", 'cpus: "0"', "both[1].cpus: '0' with device cuda"),
    ("gpus: [2, 3]", "kv_cache_space_gib: 1", "both[1].kv_cache_space_gib: has no meaning with device cuda"),
]


@pytest.mark.parametrize(("old", "new", "start"), GPU_CASES, ids=[case[2] for case in GPU_CASES])
def test_gpu_mistakes(old: str, new: str, start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        topology.parse(GPU.replace(old, new))
    assert str(caught.value).startswith(start)


def test_engines_may_share_a_gpu_when_their_memory_fits() -> None:
    text = GPU.replace("dtype: bfloat16", "dtype: bfloat16, gpu_memory_utilization: 0.45").replace("[2, 3]", "[0, 1]")
    assert [instance.gpus for instance in topology.parse(text).instances] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "this file is empty"),
        ("- a", "this file is a list"),
        ("a: [", "not valid YAML: line 1"),
        ("name: x\nmodel: demo\n", "no engine is listed"),
        ("name: x\nmodel: demo\nengine: {device: cpu}\nplain: [{port: 1}]\ncache: {size: 1GiB}", "no engine uses it"),
        ("name: x\nmodel: demo\nengine: {device: cpu}\nplain: [{port: 1}]\nproxy: {}", "no engine to send requests to"),
        ("a: !!python/object:os.system x", "not valid YAML"),
    ],
)
def test_whole_files_that_are_wrong(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        topology.parse(text)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such topology file.*local-cpu"):
        topology.load(tmp_path / "missing.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        topology.load(binary)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("1.5 GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("7", 7),
        (7, 7),
        ("1Ti", 1 << 40),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert topology.parse_size(text, "k") == size


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 70000) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from([*topology.load("local-cpu").__struct_fields__, "engine", "prefill", "decode", "both", "plain"])


@given(base=st.sampled_from([GOOD, GPU]), key=keys, value=json_values)
def test_any_value_anywhere_is_accepted_or_explained(base: str, key: str, value: object) -> None:
    raw = yaml.safe_load(base)
    raw[key] = value
    with contextlib.suppress(ConfigError):  # anything else would be a crash
        topology.parse(yaml.safe_dump(raw))
