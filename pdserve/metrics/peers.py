"""What the cache daemon of a deployment with several hosts counts; `peer` is a host's name in the topology."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from pdserve.metrics.metric import Metric

PEERS = {
    "peer_up": Metric(
        Gauge, "1 while the peer answers", ("peer",), unit="0 or 1",
        act="0: `pdserve status` says why; requests go on without what that host holds.",
    ),
    "peer_failures_total": Metric(
        Counter, "Calls to the peer that failed or were not answered in time", ("peer",), unit="calls",
        act="Grows steadily: the host, its daemon or the network between is not well; see the daemon's log.",
    ),
    "peer_chunks_total": Metric(
        Counter,
        "Chunks exchanged with the peer, by direction (in, out) and result (arrived, refused, cancelled, corrupt, late, lost, "
        "failed, dropped)",
        ("peer", "direction", "result"), unit="chunks",
        act="`refused` is common (the other has it already); `dropped` and `late` mean that the network is slower than the prefill.",
    ),
    "peer_bytes_total": Metric(
        Counter, "Bytes of chunks exchanged with the peer, by direction (in, out)", ("peer", "direction"), unit="bytes",
        act="Its rate near the link's: prefill/decode across hosts is bound by the network.",
    ),
    "peer_speed_bytes": Metric(
        Gauge, "Bytes per second that the peer is expected to send from there (dram, disk), from what it sent lately",
        ("peer", "tier"), unit="bytes/s",
        act="Low: fetching from that peer stops being worth it (peer_pull_decisions_total, too_slow).",
    ),
    "peer_directory_keys": Metric(
        Gauge, "Chunks that the peer is known to hold in that tier (dram, disk)", ("peer", "tier"), unit="chunks",
        act="0 while the peer is up and busy: its events do not arrive.",
    ),
    "peer_resyncs_total": Metric(
        Counter, "Times that everything was asked of the peer anew, after a gap or its restart", ("peer",), unit="times",
        act="Grows without restarts: more changes there than can be told in time.",
    ),
    "peer_pull_decisions_total": Metric(
        Counter,
        "Runs of chunks that peers held, by decision (pull, too_slow), and chunks asked for that did not come (missing, failed, late)",
        ("decision",), unit="runs or chunks",
        act="Mostly too_slow: computing is faster here than the network; nothing is wrong.",
    ),
}
