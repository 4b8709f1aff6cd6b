"""The explorer: what the page shows against ``svlib``, its size, keys and motion."""

from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

import svlib as sv
from tests.site.conftest import SITE
from tests.site.test_browser import browser, pytestmark  # noqa: F401

SET = """([name, value]) => {
  const control = document.querySelector(`.explorer [name=${name}]`);
  control.value = value;
  control.dispatchEvent(new Event('input', {bubbles: true}));
}"""
STATE = "document.querySelector('.explorer').state"
# pages and the settings of the parts that they hold
PARTS = {
    "index": ["heat ray"],
    "01-two-variances": ["heat ray"],
    "02-infinite-width": ["stairs heat"],
    "03-finite-width": ["ray curves"],
    "04-batchnorm": ["heat curves stairs"],
    "07-beyond": ["curves"],
    "explorer": ["heat ray curves stairs"],
}


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
        (0.2, 0.3, "layer"),
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
    ("slope", "beta", "norm"),
    [
        (0, 0, "none"), (0.3, 0.3, "none"), (0.3, 0, "none"),
        (0, 0, "batch"), (0, 0, "layer"), (0, 0.3, "layer"),
    ],
)  # fmt: skip
def test_the_dots_are_networks(
    browser: Browser,  # noqa: F811
    address: str,
    slope: float,
    beta: float,
    norm: str,
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
        normalization=None if norm == "none" else norm,
        **leaky,
    )
    for name in ("m2", "v2"):
        mine = np.array([[layer[name] for layer in network] for network in drawn])
        theirs = record[name].values
        error = np.hypot(
            mine.std(0, ddof=1) / len(mine) ** 0.5, theirs.std(0, ddof=1) / len(theirs) ** 0.5
        )
        assert (abs(mine.mean(0) - theirs.mean(0)) < 4 * error).all()


def test_batchnorm_s_drift_is_the_one_the_page_tells(browser: Browser, address: str) -> None:  # noqa: F811
    """m/v of width 100 and 64 inputs: 0.67 at layer 1, about 0.6 at layer 50."""
    page = opened(browser, address)
    given = {"width": 100, "depth": 50, "slope": 0, "beta": 0, "norm": "batch"}
    code = (
        "given => [...Array(30).keys()].map(k => svlibExplorer.simulate({...given, seed: k + 1}))"
    )
    drawn = page.evaluate(code, given)
    page.close()
    mine = np.array([[(x["m2"] / x["v2"]) ** 0.5 for x in network] for network in drawn])[:, 1:]
    record = sv.simulate(100, 50, networks=60, samples=64, seed=0, normalization="batch")
    theirs = record.ratio.values[:, [1, 50]]
    mine = mine[:, [0, 49]]
    error = np.hypot(mine.std(0, ddof=1) / 30**0.5, theirs.std(0, ddof=1) / 60**0.5)
    assert (abs(mine.mean(0) - theirs.mean(0)) < 4 * error).all()
    assert abs(mine.mean(0)[0] - 0.67) < 0.02
    assert abs(mine.mean(0)[1] - 0.6) < 0.03


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_parts_are_drawn_where_they_are_told(
    browser: Browser,  # noqa: F811
    address: str,
    name: str,
    size: tuple[int, int],
) -> None:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.goto(f"{address}book/{name}.html", wait_until="networkidle")
    found = page.evaluate("""[...document.querySelectorAll('.explorer')].map(root => ({
      views: root.dataset.views, wide: root.scrollWidth > root.clientWidth + 1,
      blank: [...root.querySelectorAll('.view:not([hidden]) canvas')].filter(c =>
        !c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x > 0)).length,
      far: root.querySelector('canvas').getBoundingClientRect().top
        - root.querySelector('.play').getBoundingClientRect().bottom}))""")
    assert [part["views"] for part in found] == PARTS[name]
    for part in found:
        assert not part["wide"]
        assert part["blank"] == 0
        assert part["far"] < 120  # Play beside the picture
    page.close()


def test_settings_live_in_the_address(browser: Browser, address: str) -> None:  # noqa: F811
    page = opened(browser, address)
    moved(page, width=32, norm="batch")
    there = page.url
    page.goto("about:blank")
    page.goto(there, wait_until="networkidle")
    given = page.evaluate(STATE)["given"]
    assert (given["width"], given["norm"], given["slope"]) == (32, "batch", 0)
    page.close()


def test_size_keys_and_motion(browser: Browser, address: str) -> None:  # noqa: F811
    files = [SITE / "_static" / f"explorer.{ending}" for ending in ("js", "css")]
    assert sum(file.stat().st_size for file in files) < 60_000
    layer = "Number(document.querySelector('.explorer [name=layer]').value)"
    page = opened(browser, address)
    page.locator(".explorer .play").focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(700)
    assert page.locator(".explorer .play").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    stopped = page.evaluate(layer)
    page.wait_for_timeout(500)
    assert 0 < stopped < 50
    assert page.evaluate(layer) == stopped
    page.locator(".explorer [name=layer]").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(layer) == stopped + 1
    label = page.locator(".explorer canvas.heat").get_attribute("aria-label") or ""
    assert f"layer {stopped + 1}" in label
    told = page.locator(".explorer .told").inner_text()
    assert "infinite width 9.02" in told
    page.close()
    page = opened(browser, address, reduced_motion="reduce")
    page.locator(".explorer .play").click()
    assert page.evaluate(layer) == 50  # at once
    page.close()
