"""docs/metrics.md, made from the tables beside this file by `make docs-generate`."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from pdserve.metrics.cache import CACHE
from pdserve.metrics.engine import ENGINE
from pdserve.metrics.metric import PREFIX, Metric
from pdserve.metrics.peers import PEERS
from pdserve.metrics.proxy import PROXY

_HEAD = """# Metrics

<!-- Made from pdserve/metrics/ by `make docs-generate`. Change it there. -->

Everything is in Prometheus' text format. The tables below are the whole catalogue: a test compares them with what running
processes export, in both directions.

| where | what |
|---|---|
| `http://PROXY/metrics` | the proxy: requests, latencies, routing, failures; all workers summed |
| `http://PROXY/metrics/engines` | every engine's own `vllm:` and `pdserve_engine_` series, with the engine's name as `instance` |
| `http://DAEMON/metrics` | a cache daemon: hits, tiers, evictions, failures, peers (admin port, `127.0.0.1:8080`) |
| `http://ENGINE/metrics` | an engine itself, as vLLM shows it |

`/metrics/engines` holds the pages that the proxy reads anyway to know the engines' load (every two seconds), so scraping it
costs the engines nothing. Where an engine's own series has a label `instance`, it is called `exported_instance`. Some of the
proxy's own series are about an engine, too, and name it in `instance`. Set `honor_labels: true` for both, as
`prometheus/prometheus.yml` does, or Prometheus puts the proxy's address in the place of the engines' names.

Labels have bounded values: instance and peer names from the topology, tiers, routes, reasons, HTTP statuses, endpoints that
the proxy serves. Nothing that a client sends (model, session, tenant, request id, path) becomes a label; those are in
`GET /admin/requests`.

Ready to use, in `deploy/` and in the installed package:

- `prometheus/prometheus.yml`: scrapes all of the above
- `prometheus/recording.yaml`: percentiles, error ratios and how much of each latency target is missed
- `prometheus/alerts.yaml`: what should wake somebody up, and what can wait until morning
- `grafana/pdserve.json`: a dashboard over these; import it and choose the data source. Its parts fit the types of
  `@grafana/schema` 13.2, and a Prometheus that scraped a running deployment answered every query; Grafana itself has not
  shown it yet

A metric that moves does not say why: [the dashboard](dashboard.md) shows the same figures live with every recent request,
and `pdserve explain REQUEST` tells the story of one.
"""
#: each with its title, and where it is shown
TABLES = (
    ("Proxy", PROXY, "At `/metrics` of the proxy."),
    ("Cache daemon", CACHE, "At `/metrics` of each daemon's admin port."),
    ("Peers", PEERS, "At the same place, in deployments over several hosts."),
    ("Connector in an engine", ENGINE, "At `/metrics` of the engine, with vLLM's `model_name` and `engine` labels before these."),
)  # fmt: skip
# What the dashboard, the rules and routing read of vLLM's own names. vLLM documents all of them.
VLLM = {
    "vllm:num_requests_running": "Requests in the engine's batches. The proxy routes by it.",
    "vllm:num_requests_waiting": "Requests that wait in the engine. Stays above zero: it is crowded, add engines of that role.",
    "vllm:kv_cache_usage_perc": "Share of the engine's KV blocks in use (0 to 1). Near 1: requests are preempted.",
    "vllm:prompt_tokens_total": "Prompt tokens taken in.",
    "vllm:generation_tokens_total": "Tokens generated.",
    "vllm:num_preemptions_total": "Requests thrown out for want of KV blocks. Any: fewer `max_num_seqs`, or more memory.",
}
_FOOT = """
## vLLM's own

Passed on unchanged but for `instance`, whatever the version of vLLM exports. Those that pdserve itself reads:

| name | meaning |
|---|---|
"""


def page() -> str:
    parts = [_HEAD]
    for title, table, where in TABLES:
        head = f"\n## {title}\n\n{where}\n\n| name | type | unit | labels | meaning | when it moves |\n|---|---|---|---|---|---|"
        parts.append("\n".join([head, *(_row(name, metric) for name, metric in table.items())]))
    vllm = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in VLLM.items())
    return "\n".join(parts) + "\n" + _FOOT + vllm + "\n"


def _row(name: str, metric: Metric) -> str:
    kind = "counter" if metric.kind is Counter else "gauge" if metric.kind is Gauge else "histogram"
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
    cells = (f"`{PREFIX}{name}`", kind, metric.unit, labels, metric.help, metric.act)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
