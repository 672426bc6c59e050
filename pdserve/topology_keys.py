"""What every key of a topology means, with an example: the one source of docs/topology.md and of the JSON Schema's hints.

tests/pdserve/test_topology_reference.py fails when a key has no entry here, when an entry has no key, and when an example
is refused by the reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Key:
    """`example` is the key's value as YAML. `needs`: other keys that the example takes to be valid, by path."""

    meaning: str
    example: str
    needs: dict[str, object] = field(default_factory=dict)


_CPU: dict[str, object] = {"engine.device": "cpu", "prefill": [{"port": 8100}], "decode": [{"port": 8200}]}

_HOSTS: dict[str, object] = {
    "hosts": [{"name": "a", "address": "10.0.0.1"}, {"name": "b", "address": "10.0.0.2"}],
    "prefill": [{"port": 8100, "host": "a"}],
    "decode": [{"port": 8200, "host": "b"}],
}
_HOST_A: dict[str, object] = {
    "hosts": [{"name": "a", "address": "10.0.0.1"}],
    "prefill": [{"port": 8100, "host": "a"}],
    "decode": [{"port": 8200, "host": "a"}],
}

KEYS: dict[str, Key] = {
    "name": Key(
        "Names the deployment: its run directory, its shared memory, `pdserve status NAME`. Small letters, digits, dashes.",
        "my-1p1d",
    ),
    "model": Key(
        "A hub id, a folder with config.json (a relative one counts from this file), `demo` or `demo-tp`.",
        "Qwen/Qwen3-8B",
    ),
    "served_model_name": Key("What clients call the model. Default: the last part of `model`.", "qwen"),
    # --- engine ---
    "engine": Key(
        "How to run every engine. Each of these keys may also stand on one engine, under `prefill`, `decode`, `both` or "
        "`plain`, and then holds for that one.",
        "{device: cuda, dtype: bfloat16}",
    ),
    "engine.kind": Key(
        "`vllm`, or `fake`: an engine without a model that answers at once, for trying things out.", "vllm"
    ),
    "engine.device": Key("What it computes on. It must be what the installed vLLM was built for.", "cuda"),
    "engine.dtype": Key("vLLM's --dtype. `auto` is what the model's files say.", "bfloat16"),
    "engine.max_model_len": Key(
        "The longest prompt and answer together, in tokens. Default: the model's own.", "32768"
    ),
    "engine.max_num_seqs": Key("Requests that are computed at once. Default: vLLM's.", "64"),
    "engine.max_num_batched_tokens": Key(
        "Tokens of one step: a longer prompt is prefilled in pieces. Default: vLLM's.", "8192"
    ),
    "engine.tensor_parallel_size": Key(
        "GPUs, or on the CPU groups of cores, that one engine is spread over.",
        "2",
        {"prefill": [{"port": 8100, "gpus": [0, 1]}], "decode": [{"port": 8200, "gpus": [2, 3]}]},
    ),
    "engine.pipeline_parallel_size": Key(
        "Stages, each with a part of the layers, that one engine is spread over; every one has tensor_parallel_size GPUs. GPU only.",
        "2",
        {"prefill": [{"port": 8100, "gpus": [0, 1]}], "decode": [{"port": 8200, "gpus": [2, 3]}]},
    ),
    "engine.gpu_memory_utilization": Key("Share of each GPU's memory that the engine may take. GPU only.", "0.9"),
    "engine.kv_cache_space_gib": Key(
        "GiB of the engine's own KV cache. CPU only; 4 when not given, since vLLM's own default there is most of the machine.",
        "1",
        _CPU,
    ),
    "engine.second_context": Key(
        "Whether an engine that generates answers has a second CUDA context, which it touches after stores and loads: 0.5 GiB of a GPU's "
        "memory for decoding steps that are 3 % shorter where the engine has the GPU to itself; see [tuning](tuning.md#a-gpu-of-its-own). "
        "Default: on H100 and H200 with 4 GiB free.",
        "false",
        {"engine.device": "cuda"},
    ),
    "engine.load_share": Key(
        "Share of the bus to the GPU that a load takes while the engine generates four answers or more and no other load waits: at 1 "
        "the request has its first token sooner, and the answers under way feel the load more, in fewer steps; see "
        "[tuning](tuning.md#loads-beside-answers). Default: 0.6.",
        "1",
        {"engine.device": "cuda"},
    ),
    "engine.enforce_eager": Key("No CUDA graphs, no compilation. Default: true on the CPU, vLLM's on a GPU.", "false"),
    "engine.enable_prefix_caching": Key(
        "The engine's own prefix cache, in its own memory. Default: vLLM's (on).", "true"
    ),
    "engine.start_timeout": Key("Seconds an engine may take until it answers, weights included.", "1800"),
    "engine.kv_transfer_config": Key(
        "vLLM's --kv-transfer-config for another connector than pdserve's, for comparisons behind the same proxy. Only where "
        "there is no `cache`; with it, `prefill` and `decode` need none.",
        "{kv_connector: NixlConnector, kv_role: kv_both}",
        {"cache": None},
    ),
    "engine.extra_args": Key(
        "Passed to `vllm serve` as they are. What pdserve sets itself (--host, --port, --kv-transfer-config, ...) is refused.",
        '["--max-logprobs", "20"]',
    ),
    "engine.env": Key("Environment variables of the engines. Values are text.", '{VLLM_LOGGING_LEVEL: "DEBUG"}'),
    # --- engines ---
    "prefill": Key("Producers (`kv_producer`): they prefill and store. Needs `decode`.", "[{port: 8100, gpus: [0]}]"),
    "prefill[].port": Key("Where this engine listens. Required.", "8100"),
    "prefill[].host": Key(
        "The address it listens on (default 127.0.0.1); with `hosts`, the host that it runs on.", "127.0.0.1"
    ),
    "prefill[].gpus": Key("Its GPUs (CUDA_VISIBLE_DEVICES), one a rank. Default: the next free ones.", "[0]"),
    "prefill[].cpus": Key(
        'Cores it computes on, on the CPU: `"0"`, `"0-3"`, `"0-1|2-3"` for two ranks. Default: cores are dealt out in turn.',
        '"0-3"',
        _CPU,
    ),
    "decode": Key(
        "Consumers (`kv_consumer`): they load what was stored and answer. Needs `prefill`.", "[{port: 8200, gpus: [1]}]"
    ),
    "both": Key(
        "Engines that do both (`kv_both`): plain vLLM with the cache. What one GPU starts with.",
        "[{port: 8300, gpus: [0]}]",
        {"prefill": [], "decode": []},
    ),
    "plain": Key(
        "Engines without the connector and not behind the proxy: what `pdserve verify` compares with.",
        "[{port: 8400, gpus: [7]}]",
    ),
    # --- cache ---
    "cache": Key(
        "The cache daemon of this host. `prefill` and `decode` need it; leave it out for engines behind the proxy alone.",
        "{size: 64GiB}",
    ),
    "cache.size": Key("Shared memory for KV, taken in full at start. It must fit in /dev/shm. Required.", "64GiB"),
    "cache.chunk_tokens": Key(
        "Tokens of a chunk: a multiple of the engines' block size (16 on GPUs, 128 on the CPU). See [tuning](tuning.md).",
        "256",
    ),
    "cache.policy": Key(
        "What goes first when memory is full: `lru`, or `cost` (recency times the work to compute it again).", "lru"
    ),
    "cache.disk": Key(
        "The tier below memory: files on this disk. Leave it out for none.", "{size: 500GiB, path: /nvme/kv}"
    ),
    "cache.disk.size": Key("The cap. It is kept: the least used segments go. Required.", "500GiB"),
    "cache.disk.path": Key("Folder. Default: `kv` in the run directory.", "/nvme/kv"),
    "cache.disk.min_free": Key("Bytes that stay free on that file system, whatever the cap says.", "10GiB"),
    "cache.disk.write": Key(
        "When a chunk is written down: at once, before it is evicted from memory, or once it was used again.",
        "on-evict",
    ),
    "cache.tiers": Key(
        "Further tiers, fastest first, by URL: `redis://`, `rediss://`, `valkey://`, `valkeys://`, `s3://`, `mooncake://`, "
        "`file://`. Options follow a question mark (`?ttl=3600`). A password is best written as the name of an environment variable, "
        "`redis://:${NAME}@host`, or kept in a file, `?password_file=PATH`; it never appears on a command line or in a log.",
        '["redis://:${KV_PASSWORD}@kv.example:6379/0?ttl=86400"]',
    ),
    "cache.load": Key(
        "What engines do with KV that is found: `adaptive` loads what is faster loaded than computed, by their own measurements; "
        "`always` loads; `never` loads only what a producer hands over. The last two are for comparisons.",
        "adaptive",
    ),
    "cache.patience": Key(
        "So many times as long as usual do engines wait for the cache: by default a lookup gets 50 ms before the prompt is computed. "
        "More than 1 where the daemon may get no processor for that long (two cores that engines compute on) and computing takes seconds.",
        "10",
    ),
    "cache.payload": Key(
        "`int8` or `fp8` stores KV in 8 bits a value: about half the bytes on the bus and in every tier, at the price of answers that are "
        "no longer exactly plain vLLM's. `int8` loses less; see [tuning](tuning.md#half-the-bytes). Default: the engine's own bytes.",
        "int8",
    ),
    "cache.layer_groups": Key(
        "Groups of equally many layers into which a chunk is cut, so that each stage of a pipeline moves its own. Part of the key: engines "
        "share chunks where it is equal, whatever their parallel sizes. Default: the least that all engines here need, which is 1 without "
        "`pipeline_parallel_size`. Set it where engines with and without a pipeline meet in a further tier.",
        "2",
    ),
    "cache.admin_host": Key(
        "Address of /healthz, /status, /metrics. Off loopback it wants PDSERVE_ADMIN_TOKEN.", "127.0.0.1"
    ),
    "cache.admin_port": Key("And its port.", "8080"),
    # --- tracing ---
    "tracing": Key(
        "OpenTelemetry spans of proxy, engines and cache, one trace a request; see [observability](observability.md). "
        "Default: none.",
        "{endpoint: http://127.0.0.1:4318}",
    ),
    "tracing.endpoint": Key("Where they are sent, as OTLP over HTTP.", "http://127.0.0.1:4318"),
    "tracing.sample": Key(
        "Share of requests that are traced, from 0 to 1. A client's own decision (its traceparent header) counts first.",
        "0.1",
        {"tracing.endpoint": "http://127.0.0.1:4318"},
    ),
    # --- proxy ---
    "proxy": Key("The OpenAI API in front of it all. `null`: none.", "{port: 8000}"),
    "proxy.host": Key(
        "Address it listens on. `0.0.0.0` for every network: set `api_keys` then. With `hosts`, the host that it runs on "
        "(default: the first).",
        "127.0.0.1",
    ),
    "proxy.port": Key("Where clients go; /health, /metrics and the admin routes as well.", "8000"),
    "proxy.policy": Key(
        "How an engine is chosen. `session` keeps a conversation (X-Session-ID) on one; `prefix` and `chunk_location` go "
        "where the prompt's beginning was last.",
        "least_load",
    ),
    "proxy.prefill_policy": Key("The same for the producers alone. Default: `policy`.", "chunk_location"),
    "proxy.decode_policy": Key("The same for the consumers alone. Default: `policy`.", "session"),
    "proxy.workers": Key("Processes that share the port. One is enough up to hundreds of requests a second.", "2"),
    "proxy.pd_min_tokens": Key(
        "Prompts with fewer uncached tokens are prefilled by the consumer itself; 0: all are split. See [tuning](tuning.md).",
        "512",
    ),
    "proxy.pd_adaptive": Key(
        "Measures first tokens with and without a producer, and lets the consumer prefill by itself where that is sooner and "
        "disturbs no running answer. See [proxy](proxy.md).",
        "true",
    ),
    "proxy.early_decode": Key(
        "Sends the decode leg while the prefill still runs: the consumer loads chunks as they come. Hides most of the handover; "
        "keeps room in the consumer's KV cache meanwhile.",
        "true",
    ),
    "proxy.early_token": Key(
        "Gives clients the producer's own first token as soon as the prefill is done; the consumer goes on behind it. For streams "
        "of plain text; best with `early_decode`. See [proxy](proxy.md).",
        "true",
    ),
    "proxy.slo_ttft": Key(
        "Target in seconds for the first token. Set: requests queue, and are refused (429) when it cannot be met.",
        "2.5",
    ),
    "proxy.slo_itl": Key(
        "Target in seconds for the time between tokens. Set: the number of running streams is limited so that it is met.",
        "0.05",
    ),
    "proxy.slo_classes": Key(
        "Classes of requests with targets of their own, by name: `ttft`, `itl` (seconds) and `priority` (lower is earlier); "
        "see [proxy](proxy.md).",
        "{interactive: {ttft: 0.5, itl: 0.05}, batch: {priority: 10}}",
    ),
    "proxy.api_keys": Key(
        "A file of hashed keys; see [security](security.md). Default: anybody may ask.", "/etc/pdserve/keys"
    ),
    "proxy.prefill_timeout": Key("Seconds a producer may take before another one is tried.", "600"),
    "proxy.extra_args": Key(
        "Further flags of `pdserve proxy`; see [the commands](cli.md).", '["--max-body-mib", "128"]'
    ),
    # --- several hosts ---
    "hosts": Key(
        "The machines, where there are several; `host` of an engine or of the proxy then names one of them. See [hosts](hosts.md).",
        "[{name: a, address: 10.0.0.1}, {name: b, address: 10.0.0.2}]",
        _HOSTS,
    ),
    "hosts[].name": Key("What the topology and `pdserve launch --host` call it.", "a", _HOST_A),
    "hosts[].address": Key("What the other hosts reach it by.", "10.0.0.1", _HOST_A),
    "hosts[].peer_url": Key(
        "Where the other cache daemons reach the one of this host, if not at its `address` by the way that `peers` says.",
        "ucx://10.9.0.1:7900",
        _HOST_A,
    ),
    "peers": Key("How the cache daemons of several hosts talk to each other.", "{transport: tcp, port: 7900}", _HOSTS),
    "peers.transport": Key("`tcp`, `ucx` or `nixl`; see [transports](transports.md).", "tcp", _HOSTS),
    "peers.port": Key("Where each daemon listens for the others, on its host's address.", "7900", _HOSTS),
    "peers.discover": Key(
        "Further peers, from a list that changes while everything runs: `dns://NAME:PORT` or `etcd://HOST:PORT/PREFIX`. "
        "Default: the hosts of the topology alone.",
        "dns://kv-peers.default.svc:7900",
        _HOSTS,
    ),
    "peers.secret_file": Key(
        "Holds what every daemon must know, the same on all hosts. Default: the variable PDSERVE_PEER_SECRET.",
        "/etc/pdserve/peers.secret",
        _HOSTS,
    ),
    "peers.cert": Key(
        "TLS (tcp only): this host's certificate, PEM. Needs `peers.key`.", "/etc/pdserve/cert.pem", _HOSTS
    ),
    "peers.key": Key("TLS: its key, PEM.", "/etc/pdserve/key.pem", _HOSTS),
    "peers.ca": Key("TLS: who must have signed the other hosts' certificates, PEM.", "/etc/pdserve/ca.pem", _HOSTS),
}
