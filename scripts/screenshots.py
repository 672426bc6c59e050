"""`python -P scripts/screenshots.py`: the pictures in docs/images, of the dashboard busy, idle and broken.

Over fake engines, a real cache daemon and a real proxy; what engines would store, load and tell is done in their place
(tests/support/dashboard_stand.py). Needs chromium, playwright and pillow.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from dashboard_stand import Shadow, Stand, traffic  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

ENGINES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
DESK = {"width": 1360, "height": 900}
PHONE = {"width": 390, "height": 844}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=75, help="of traffic before the first picture of it")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "images", help="folder (default %(default)s)")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with Stand(Path(folder), ENGINES, "--slo-ttft", "2", "--pd-min-tokens", "60") as stand, Shadow(stand) as shadow:
            Shots(browser, stand, args.to).take(shadow, args.seconds)
        browser.close()


class Shots:
    def __init__(self, browser: Any, stand: Stand, to: Path) -> None:
        self._browser, self._stand, self._to = browser, stand, to

    def take(self, shadow: Shadow, seconds: float) -> None:
        desk, phone = self._page(DESK), self._page(PHONE)
        time.sleep(6)
        self._shot(desk, "idle-light")
        with traffic(self._stand, shadow, every=0.15, at_once=3):
            time.sleep(seconds)
            self._shot(desk, "busy-light")
            self._shot(desk, "busy-dark", dark=True)
            self._top(phone, "phone-light")
            self._shot_detail(desk, phone)
            self._stand.kill("decode-1")
            self._stand.kill("cache")
            time.sleep(6)
            self._shot(desk, "broken-light")
            self._shot(desk, "broken-dark", dark=True)
            self._top(phone, "phone-broken-dark", dark=True)
        self._stand.kill("proxy")
        time.sleep(9)
        self._top(desk, "stale-light")

    def _page(self, viewport: dict[str, int]) -> Any:
        page = self._browser.new_context(viewport=viewport, device_scale_factor=1).new_page()
        page.goto(f"{self._stand.url}/dashboard")
        page.wait_for_selector("#live .state.good", timeout=30_000)
        return page

    def _top(self, page: Any, name: str, dark: bool = False, selector: str = "") -> None:
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.evaluate("window.scrollTo(0, 0)")
        if selector:
            page.locator(selector).scroll_into_view_if_needed()
        time.sleep(1.2)
        self._save(page, name)

    def _shot(self, page: Any, name: str, dark: bool = False) -> None:
        """All of the page, by a window that is as tall as it."""
        page.evaluate("window.scrollTo(0, 0)")
        page.emulate_media(color_scheme="dark" if dark else "light")
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({**DESK, "height": min(1700, height)})
        time.sleep(1.2)
        self._save(page, name)
        page.set_viewport_size(DESK)

    def _save(self, page: Any, name: str) -> None:
        """With 256 colours, which is a third of the size and looks the same."""
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        shot.quantize(256, dither=Image.Dither.NONE).save(self._to / f"dashboard-{name}.png", optimize=True)

    def _shot_detail(self, desk: Any, phone: Any) -> None:
        for page, name in ((desk, "request-light"), (phone, "phone-request-light")):
            page.emulate_media(color_scheme="light")
            page.locator("#requests tbody tr", has=page.locator(".share:not([hidden])")).nth(4).click()
            page.wait_for_selector(".chunk-grid button", timeout=30_000)
            page.locator(".chunk-grid button").last.focus()
            time.sleep(0.5)
            self._save(page, name)
            page.keyboard.press("Escape")


if __name__ == "__main__":
    main()
