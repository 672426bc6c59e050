"""The page in a real browser, over fake engines, a real cache daemon and a real proxy."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dashboard_stand import Shadow, Stand, until
from prometheus_client.parser import text_string_to_metric_families

PATIENCE = 90_000  # ms; reached only when a test fails
Open = Callable[..., Any]


def opened(open_page: Open, stand: Stand, **options: Any) -> Any:
    page = open_page(f"{stand.url}/dashboard", **options)
    page.wait_for_selector("#live .state.good", timeout=PATIENCE)
    return page


def totals(stand: Stand, name: str) -> float:
    families = text_string_to_metric_families(stand.get("/metrics"))
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def raw(page: Any, tile: str) -> float:
    return float(page.get_attribute(f"#tile-{tile}", "data-raw") or "nan")


def test_it_loads_without_an_error(open_page: Open, stand: Stand) -> None:
    page = opened(open_page, stand)
    assert page.locator("#topology article").count() == 4
    assert page.locator("#charts canvas").count() > 0
    assert page.wrong == []


def test_all_that_is_loaded_is_small_and_from_here(open_page: Open, stand: Stand) -> None:
    page = open_page("about:blank")
    sizes: dict[str, int] = {}

    def loaded(response: Any) -> None:
        if "/dashboard" in response.url:
            sizes[response.url] = len(response.body())

    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfinished", lambda request: loaded(request.response()))
    page.goto(f"{stand.url}/dashboard")
    page.wait_for_selector("#live .state.good", timeout=PATIENCE)
    assert len(sizes) > 10
    assert sum(sizes.values()) < 300_000
    assert [url for url in asked if not url.startswith(stand.url)] == []


def test_figures_are_those_of_metrics(open_page: Open, stand: Stand, shadow: Shadow) -> None:
    page = opened(open_page, stand)
    for number in range(5):
        assert stand.ask(30 + number)[0] == 200
    assert stand.ask(model="nobody-has-it")[0] == 404
    keys = shadow.store(6)
    assert shadow.load(keys) == 6
    until(lambda: raw(page, "requests") == totals(stand, "pdserve_requests_total") >= 6, "requests")

    def engines() -> float:  # asked again and again: the proxy reads their pages now and then
        return sum(totals_of_engine(stand, name) for name in stand.engines)

    def used() -> float:
        return stand.cache_metric("pdserve_cache_chunks", tier="dram")

    def loading() -> bool:  # rates are of the last seconds, so it goes on
        shadow.load(keys)
        return "from dram" in page.inner_text('[data-link="decode-0"]')

    until(loading, "bytes on the link of one engine")
    assert page.locator('[data-link="decode-1"]').count() == 0, "that one is connected to no daemon"
    until(lambda: raw(page, "hits") == engines() > 0, "tokens from the cache")
    assert raw(page, "failures") == totals(stand, "pdserve_leg_failures_total") == 0
    until(lambda: f"{used():.0f} chunks" in page.inner_text('[data-tier="dram"]'), "chunks in memory")
    until(lambda: page.locator("#requests tbody tr").count() >= 6, "rows")
    assert page.wrong == []


def totals_of_engine(stand: Stand, name: str) -> float:
    families = text_string_to_metric_families(stand.get("/metrics/engines"))
    wanted = "pdserve_engine_loaded_tokens_total"
    return sum(s.value for f in families for s in f.samples if s.name == wanted and s.labels["instance"] == name)


def test_a_killed_consumer_turns_red_and_back(open_page: Open, stand: Stand) -> None:
    page = opened(open_page, stand)
    node = page.locator('[data-engine="decode-1"]')
    until(lambda: stand.overview()["picture"]["engines"][2]["running"] is not None, "its metrics were read once")
    assert node.get_attribute("data-state") == "up"
    stand.kill("decode-1")
    began = time.monotonic()
    page.wait_for_selector('[data-engine="decode-1"][data-state="down"].is-down', timeout=PATIENCE)
    print(f"red after {time.monotonic() - began:.1f} s")  # shown by pytest -s; how long it takes depends on the machine
    assert "✕ down" in " ".join(node.inner_text().split())  # a mark and a word, not a colour alone
    assert "decode-1 down" in page.inner_text("#overall")
    assert page.get_attribute('[data-engine="decode-0"]', "data-state") == "up"
    stand.start_engine("decode-1")
    page.wait_for_selector('[data-engine="decode-1"]:not([data-state="down"])', timeout=PATIENCE)
    until(lambda: "1 restarts seen" in page.inner_text('[data-engine="decode-1"]'), "the restart was counted")
    assert stand.ask()[0] == stand.ask()[0] == 200
    page.wait_for_selector('[data-engine="decode-1"][data-state="up"]', timeout=PATIENCE)
    assert page.wrong == []


def test_a_request_opens_by_click_and_by_keyboard(open_page: Open, stand: Stand, shadow: Shadow) -> None:
    keys = shadow.store(8)
    for name in ("first-of-two", "second-of-two"):
        assert stand.ask(headers={"x-request-id": name})[0] == 200
        shadow.tell(name, keys, 5)
    page = opened(open_page, stand)
    page.click('tr[data-request="first-of-two"]')
    page.wait_for_selector(".timeline li", timeout=PATIENCE)
    names = page.locator(".timeline .span-name b").all_inner_texts()
    assert {"Prefill", "Decode"} <= set(names)
    page.wait_for_selector(".chunk-grid button", timeout=PATIENCE)
    letters = "".join(page.locator(".chunk-grid button").all_inner_texts())
    assert letters == "MMMMMCCC"
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()

    page.focus("#filter")
    page.keyboard.press("Tab")  # one row is in the tab order
    assert page.evaluate("document.activeElement.closest('tr').dataset.request") == "first-of-two"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.closest('tr').dataset.request") == "second-of-two"
    page.keyboard.press("Enter")
    page.wait_for_selector(".chunk-grid button", timeout=PATIENCE)
    assert page.inner_text("#detail-title") == "second-of-two"
    page.locator(".chunk-grid button").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".chunk-line").startswith("Chunk 1, tokens 256 to 511: from memory")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.closest('tr').dataset.request") == "second-of-two"
    assert page.wrong == []


@pytest.mark.parametrize(
    "hostile", ["<img src=x onerror=alert(1)>", '"><script>alert(2)</script>', "javascript:alert(3)"]
)
def test_what_clients_say_stays_text(open_page: Open, stand: Stand, hostile: str) -> None:
    headers = {"x-session-id": hostile, "x-request-id": f"hostile-{len(hostile)}"}
    stand.ask(model=hostile, headers=headers)
    page = opened(open_page, stand)
    page.wait_for_selector(f'tr[data-request="hostile-{len(hostile)}"]', timeout=PATIENCE)
    page.click(f'tr[data-request="hostile-{len(hostile)}"]')
    page.wait_for_selector(".record", timeout=PATIENCE)
    until(lambda: hostile in page.inner_text("#detail"), "the text is shown as it is")
    assert page.locator("main img, dialog img, main script, dialog script").count() == 0
    assert page.wrong == []


def test_what_is_old_says_so(open_page: Open, stand: Stand) -> None:
    page = opened(open_page, stand)
    stand.kill("proxy")
    page.wait_for_selector("body.stale", timeout=PATIENCE)
    assert "stale" in page.inner_text("#live")
    notice = page.inner_text("#notice")
    assert "ago: the proxy does not answer. Trying again" in notice
    assert page.evaluate("getComputedStyle(document.querySelector('main')).filter") == "grayscale(1)"
    stand.start_proxy()
    page.wait_for_selector("body:not(.stale)", timeout=PATIENCE)
    page.wait_for_selector("#live .state.good", timeout=PATIENCE)
    assert not page.locator("#notice").is_visible()


def test_a_daemon_that_is_gone_is_named_with_its_age(open_page: Open, stand: Stand) -> None:
    page = opened(open_page, stand)
    page.wait_for_selector('[data-cache="cache"][data-state="up"]', timeout=PATIENCE)
    stand.kill("cache")
    page.wait_for_selector('[data-cache="cache"][data-state="down"]', timeout=PATIENCE)
    assert "no connection" in page.inner_text('[data-cache="cache"]')
    assert "old" in page.inner_text('[data-cache="cache"]')
    stand.start_cache()
    page.wait_for_selector('[data-cache="cache"][data-state="up"]', timeout=PATIENCE)
    assert page.wrong == []


@pytest.mark.parametrize("width", [390, 768, 1360])
def test_nothing_is_wider_than_the_screen(open_page: Open, stand: Stand, width: int) -> None:
    page = opened(open_page, stand, viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    stand.ask(headers={"x-request-id": "a-very-long-request-id-that-somebody-chose-" + "x" * 60})
    page.wait_for_selector("#requests tbody tr", timeout=PATIENCE)
    page.locator("#requests tbody tr").first.click()
    page.wait_for_selector(".timeline li", timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#detail').scrollWidth") <= width


def test_the_theme_follows_the_system_and_the_button(open_page: Open, stand: Stand) -> None:
    page = opened(open_page, stand, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.click("#theme")  # auto -> light
    page.click("#theme")  # light -> dark
    assert page.evaluate(ground) == dark
    page.reload()
    page.wait_for_selector("#live .state.good", timeout=PATIENCE)
    assert page.evaluate(ground) == dark
    assert page.get_attribute("#theme", "aria-label") == "Theme: dark. Change it"


def test_every_control_has_a_name_and_is_reached_by_tab(open_page: Open, stand: Stand) -> None:
    stand.ask()
    page = opened(open_page, stand)
    page.wait_for_selector("#requests tbody tr", timeout=PATIENCE)
    nameless = """[...document.querySelectorAll('button, input')].filter((e) => e.offsetParent && !(
        e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).length"""
    assert page.evaluate(nameless) == 0
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(7):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", seen
    assert seen[:2] == ["Skip to content", "theme"]
    assert {"5 min", "15 min", "1 h", "filter"} <= set(seen)


def test_a_key_is_asked_for_and_kept_in_the_tab(open_page: Open, folder: Path) -> None:
    with Stand(folder, ("both-0",), key="open sesame") as stand:
        page = open_page(f"{stand.url}/dashboard")
        page.wait_for_selector("#login", timeout=PATIENCE)
        assert not page.locator("#content").is_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        until(lambda: "missing or wrong" in page.inner_text("#login-error"), "the refusal is shown")
        page.fill("#key", "open sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#live .state.good", timeout=PATIENCE)
        assert page.locator("#topology article").count() == 2
        assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]") == [["open sesame"], []]
        page.reload()
        page.wait_for_selector("#live .state.good", timeout=PATIENCE)
        page.click("#leave")
        page.wait_for_selector("#login", timeout=PATIENCE)
        assert page.evaluate("sessionStorage.length") == 0


def test_several_workers_show_one_picture(open_page: Open, folder: Path) -> None:
    with Stand(folder, ("both-0",), "--workers", "2") as stand:
        page = opened(open_page, stand)
        for _ in range(12):
            stand.ask()
        until(lambda: raw(page, "requests") == totals(stand, "pdserve_requests_total") == 12, "all workers' requests")
        until(lambda: page.locator("#requests tbody tr").count() == 12, "all workers' records")
        seen = [stand.overview()["samples"][0]["t"] for _ in range(6)]  # answered by either of them
        assert len(set(seen)) == 1
        assert "2 workers" in page.inner_text("#about")
