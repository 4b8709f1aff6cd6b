"""The explorer: what the page shows against ``svlib``, its size, keys and motion."""

from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

import svlib as sv
from tests.site.conftest import SITE
from tests.site.test_browser import browser, pytestmark  # noqa: F401

SET = """([name, value]) => {
  const control = document.querySelector(`#explorer [name=${name}]`);
  control.value = value;
  control.dispatchEvent(new Event('input'));
}"""
STATE = "svlibExplorer.state"


def opened(browser: Browser, address: str, **options: Any) -> Page:  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
    page.goto(f"{address}book/explorer.html", wait_until="networkidle")
    return page


def moved(page: Page, **values: Any) -> dict[str, Any]:
    """What the page holds after its controls were set."""
    for name, value in values.items():
        page.evaluate(SET, [name, str(value)])
    page.wait_for_timeout(1200)
    found: dict[str, Any] = page.evaluate(STATE)
    return found


def test_the_lines_are_svlib_s(browser: Browser, address: str) -> None:  # noqa: F811
    page = opened(browser, address)
    for slope, beta, norm in (
        (0, 0, None),
        (0.3, 0, None),
        (1, 0, None),
        (0, 0.1, None),
        (0, 0, "batch"),
        (0.2, 0.3, "batch"),
    ):
        state = moved(page, slope=slope, beta=beta, norm=norm or "none", width=64, depth=50)
        assert state["given"]["slope"] == slope
        leaky: Any = {"activation": "leaky_relu", "negative_slope": float(slope)} if slope else {}
        exact = sv.theory.trajectory(50, residual=beta or None, normalization=norm, **leaky)
        np.testing.assert_allclose(state["fraction"], exact.fraction, rtol=1e-10)
        np.testing.assert_allclose(state["sigma2"], exact.sigma2, rtol=1e-10)
    state = moved(page, slope=0, beta=0, norm="none")
    radial = sv.theory.finite_width(64, 50)
    expected = (exact_gap() / (1 - exact_gap()) + radial.radial[1:] / radial.m2[1:]) ** -0.5
    np.testing.assert_allclose(state["law"][1:], expected, rtol=1e-6)
    page.close()


def exact_gap() -> np.ndarray:
    return np.asarray(sv.theory.trajectory(50).fraction[1:])


@pytest.mark.parametrize(
    ("slope", "beta", "norm"), [(0, 0, False), (0.3, 0.3, False), (0, 0, True)]
)
def test_the_dots_are_networks(
    browser: Browser,  # noqa: F811
    address: str,
    slope: float,
    beta: float,
    norm: bool,
) -> None:
    page = opened(browser, address)
    given = {"width": 64, "depth": 10, "slope": slope, "beta": beta, "norm": norm}
    code = (
        "given => [...Array(60).keys()].map(k => svlibExplorer.simulate({...given, seed: k + 1}))"
    )
    drawn = page.evaluate(code, given)
    page.close()
    leaky: Any = {"activation": "leaky_relu", "negative_slope": slope} if slope else {}
    record = sv.simulate(
        64,
        10,
        networks=400,
        samples=64,
        seed=0,
        residual=beta or None,
        normalization="batch" if norm else None,
        **leaky,
    )
    for name in ("m2", "v2"):
        mine = np.array([[layer[name] for layer in network] for network in drawn])
        theirs = record[name].values
        error = np.hypot(
            mine.std(0, ddof=1) / len(mine) ** 0.5, theirs.std(0, ddof=1) / len(theirs) ** 0.5
        )
        assert (abs(mine.mean(0) - theirs.mean(0)) < 4 * error).all()


def test_size_keys_and_motion(browser: Browser, address: str) -> None:  # noqa: F811
    files = [SITE / "explorer.js", SITE / "explorer.css", SITE / "book" / "explorer.html"]
    assert sum(file.stat().st_size for file in files) < 300_000
    layer = "Number(document.querySelector('#explorer [name=layer]').value)"
    page = opened(browser, address)
    page.locator("#explorer-play").focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(700)
    assert page.locator("#explorer-play").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    stopped = page.evaluate(layer)
    page.wait_for_timeout(500)
    assert 0 < stopped < 50
    assert page.evaluate(layer) == stopped
    page.locator("#explorer [name=layer]").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(layer) == stopped + 1
    label = page.locator("#explorer-heat").get_attribute("aria-label") or ""
    assert f"layer {stopped + 1}" in label
    told = page.locator("#explorer-told").inner_text()
    assert "infinite width has 9.02" in told
    page.close()
    page = opened(browser, address, reduced_motion="reduce")
    page.locator("#explorer-play").click()
    assert page.evaluate(layer) == 50  # at once
    page.close()
