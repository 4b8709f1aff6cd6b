"""Every page in headless Chromium.

No request leaves the site, no error, all mathematics is typeset, nothing overflows.
"""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.site.conftest import PAGES

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync"]

if CHROMIUM is None and os.environ.get("CI"):
    raise RuntimeError(
        "continuous integration must have chromium: the browser test would be skipped"
    )
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium found; name one in the environment variable CHROMIUM"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page(browser: Browser, address: str, name: str, scheme: str) -> None:
    page = browser.new_page(
        viewport={"width": 390, "height": 844}, color_scheme="dark" if scheme == "dark" else "light"
    )
    complaints: list[str] = []
    page.on(
        "request",
        lambda request: (
            complaints.append(request.url) if not _local(request.url, address) else None
        ),
    )
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "response",
        lambda response: complaints.append(response.url) if response.status >= 400 else None,
    )
    try:
        page.goto(address + name, wait_until="networkidle")
        if page.locator(".math").count():
            page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
            page.evaluate("MathJax.startup.promise")
        assert page.locator("mjx-merror").count() == 0
        assert page.locator(".math:not(:has(mjx-container))").count() == 0
        page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
        assert (
            page.evaluate(
                "[...document.images]"
                ".filter(image => image.complete && !image.naturalWidth).map(i => i.src)"
            )
            == []
        )
        assert (
            page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            <= 0
        )
        assert complaints == []
    finally:
        page.close()


def _local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))
