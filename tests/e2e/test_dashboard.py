"""The dashboard and the metrics over real engines."""

from __future__ import annotations

from typing import Any

from dashboard_stand import until
from in_browser import chromium, new_page
from prometheus_client.parser import text_string_to_metric_families

from pdserve.metrics.engine import ENGINE
from pdserve.metrics.metric import PREFIX
from pdserve.metrics.reference import VLLM
from pdserve.openai_client import Client

PATIENCE = 60_000  # ms; reached only when a test fails


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def page_of(url: str) -> str:
    with Client(url) as client:
        return str(client.get("/metrics", timeout=20).text)


def requests(pd: Any) -> float:
    samples = families(page_of(pd.target.url))["pdserve_requests"].samples
    return float(sum(sample.value for sample in samples if sample.name.endswith("_total")))


def test_engines_export_the_catalogue_and_what_is_read_of_vllm(pd: Any) -> None:
    prompt = pd.ids(600)
    pd.client.complete(prompt, max_tokens=4)
    pd.forget()
    pd.client.complete(prompt, max_tokens=4)  # a load, which engines tell of
    consumer = families(page_of(pd.target.engines["decode"][0]))
    ours = {name for name in consumer if name.startswith("pdserve_") and not name.endswith("_created")}
    assert ours == {(PREFIX + name).removesuffix("_total") for name in ENGINE}
    assert {name.removesuffix("_total") for name in VLLM} <= set(consumer)

    def passed_on() -> bool:
        with Client(pd.target.url) as proxy:
            found = families(proxy.get("/metrics/engines", timeout=20).text)
        loaded = found["pdserve_engine_loaded_tokens"].samples if "pdserve_engine_loaded_tokens" in found else []
        return sum(s.value for s in loaded if s.labels["instance"] == "decode-0" and s.name.endswith("_total")) >= 512

    until(passed_on, "the consumer's loads are at the proxy's /metrics/engines")


def test_the_page_shows_a_hit_and_its_story(pd: Any) -> None:
    prompt = pd.ids(700)
    pd.client.complete(prompt, max_tokens=4)
    pd.forget()
    with chromium() as browser:
        page = new_page(browser)
        page.goto(f"{pd.target.url}/dashboard")
        page.wait_for_selector("#live .state.good", timeout=PATIENCE)
        page.wait_for_selector('[data-engine="decode-0"][data-state="up"]', timeout=PATIENCE)
        until(lambda: "0.32" in page.inner_text('[data-engine="decode-0"] footer'), "the engine's version is told")
        assert "restarts seen" not in page.inner_text('[data-engine="decode-0"]'), "the launcher tells its restarts"
        pd.client.complete(prompt, max_tokens=4)
        row = page.locator("#requests tbody tr").first
        until(lambda: row.count() and "dram" in row.inner_text(), "the row tells what came from memory")
        until(lambda: float(page.get_attribute("#tile-requests", "data-raw")) == requests(pd), "figures as in /metrics")
        row.click()
        page.wait_for_selector(".chunk-grid button", timeout=PATIENCE)
        letters = page.locator(".chunk-grid button").all_inner_texts()
        assert letters[:2] == ["M", "M"]
        assert {"Prefill", "Decode"} <= set(page.locator(".span-name b").all_inner_texts())
        assert page.wrong == []
