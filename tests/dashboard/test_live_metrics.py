"""What running processes export, against the catalogue; and that clients cannot make it grow."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from dashboard_stand import Shadow, Stand, get, until
from prometheus_client.parser import text_string_to_metric_families

from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import PREFIX, Metric
from pdserve.metrics.proxy import PROXY

PYTHONS_OWN = ("python_", "process_")


def page(stand: Stand, which: str) -> str:
    url = f"http://127.0.0.1:{stand.cache_port}/metrics" if which == "cache" else f"{stand.url}/{which}"
    return str(get(url, stand.key))


def families(text: str) -> set[str]:
    found = {family.name for family in text_string_to_metric_families(text)}
    return {name for name in found if not name.startswith(PYTHONS_OWN) and not name.endswith("_created")}


def catalogue(table: dict[str, Metric]) -> set[str]:
    return {(PREFIX + name).removesuffix("_total") for name in table}


def test_the_proxy_exports_its_catalogue_and_nothing_else(stand: Stand) -> None:
    assert stand.ask()[0] == 200
    assert families(page(stand, "metrics")) == catalogue(PROXY)


def test_the_daemon_exports_its_catalogue_and_nothing_else(stand: Stand, shadow: Shadow) -> None:
    shadow.load(shadow.store(3))
    assert families(page(stand, "cache")) == catalogue(CACHE)


def test_several_workers_export_the_same(tmp_path: Path) -> None:
    with Stand(tmp_path, ("both-0",), "--workers", "2") as stand:
        for _ in range(4):
            assert stand.ask()[0] == 200
        found = families(page(stand, "metrics"))
        assert found <= catalogue(PROXY)  # of what has no series yet, several workers show nothing
        assert "pdserve_requests" in found


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here (Debian package prometheus)")
@pytest.mark.parametrize("which", ["metrics", "cache"])
def test_promtool_finds_nothing_to_say(stand: Stand, which: str) -> None:
    text = page(stand, which)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def wait_for_engines(stand: Stand) -> None:
    """Until the proxy has read every engine's page."""

    def told() -> bool:
        found = text_string_to_metric_families(page(stand, "metrics/engines"))
        running = [
            sample for family in found if family.name == "vllm:num_requests_running" for sample in family.samples
        ]
        return {sample.labels["instance"] for sample in running} == set(stand.engines)

    until(told, "every engine's page was read")


def test_engines_pages_are_passed_on_under_their_names(stand: Stand) -> None:
    wait_for_engines(stand)
    text = page(stand, "metrics/engines")
    announced = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(announced) == len(set(announced)), "a family that is announced twice is refused by Prometheus"


def series(text: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, tuple(sorted(sample.labels.items()))) for sample in found}


def everything_odd(stand: Stand, number: int) -> None:
    """What a client may vary, all of it unlike what came before."""
    one = f"client-{number}"
    headers = {"x-request-id": one, "x-session-id": one, "authorization": f"Bearer {one}"}
    stand.ask(headers=headers, user=one, cache_salt=one)
    stand.ask(model=one)
    for method, path in (
        ("POST", f"/v1/{one}"),
        ("GET", f"/{one}"),
        ("DELETE", f"/admin/instances/{one}"),
        ("GET", f"/admin/requests/no-{one}"),
    ):
        request = urllib.request.Request(stand.url + path, b"{}" if method == "POST" else None, headers, method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        refused.value.read()
    with socket.create_connection(("127.0.0.1", stand.proxy_port), timeout=10) as line:
        line.sendall(f"{one.upper()} /v1/completions HTTP/1.1\r\nhost: x\r\nx-{one}: 1\r\n\r\n".encode())
        line.recv(4096)
    body = json.dumps({"model": "fake", "prompt": one, "max_tokens": -number}).encode()
    request = urllib.request.Request(stand.url + "/v1/completions", body[: 5 + number], {"content-type": one})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    refused.value.read()


def test_clients_cannot_make_series(stand: Stand) -> None:
    for number in range(3):
        everything_odd(stand, number)
    wait_for_engines(stand)
    before = {which: series(page(stand, which)) for which in ("metrics", "cache", "metrics/engines")}
    for number in range(3, 40):
        everything_odd(stand, number)
    for which, known in before.items():
        # One for each client would be 37. A reason that a busy machine adds (a probe that came late) is no client's doing.
        new = series(page(stand, which)) - known
        assert len(new) < 12, (which, new)
        assert "client-" not in page(stand, which)
