"""Every page has no violation that axe-core finds: both colour schemes, 1280 and 390 pixels wide, also where empty.

axe leaves some contrasts undecided (texts that are scrolled away, texts in plots): those are computed here.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
from conftest import random_rows
from pages import make_store
from test_pages import contrasts
from test_pages_tokens import told  # noqa: F401 - a fixture
from test_serve import server, train, typed  # noqa: F401 - fixtures

from ooc_influence.report import write_report

pytestmark = pytest.mark.filterwarnings("ignore::ooc_influence.OocInfluenceWarning")

WIDTHS = {1280: 900, 390: 844}
RUN = """
const [rules, done] = arguments;
axe.run(document, rules ? { runOnly: rules } : {}).then((found) => {
  const told = (results) => results.flatMap((own) => own.nodes.map((node) =>
    ({ rule: own.id, target: node.target[0], why: node.failureSummary })));
  done({ violations: told(found.violations), undecided: told(found.incomplete), passed: found.passes.length });
}, (error) => done({ error: String(error) }));
"""


@pytest.fixture(scope="module")
def axe():
    """axe-core's script, out of the package that brings it."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("needs axe-core: pip install axe-playwright-python")
    return (Path(found.origin).parent / "axe.min.js").read_text("utf-8")


@contextlib.contextmanager
def screen(page, width, scheme="light"):
    """A screen of a width and a colour scheme."""
    size = {"width": width, "height": WIDTHS[width], "deviceScaleFactor": 1, "mobile": width < 600}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    paint(page, scheme)
    try:
        yield
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def paint(page, scheme):
    """Change the colour scheme of what is shown."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


def faults(page, axe, *rules):
    """What axe finds wrong with what is shown, and contrasts that it left undecided and are too low."""
    page.driver.set_script_timeout(120)
    if page.run("return !window.axe"):
        page.run(axe)
    found = page.driver.execute_async_script(RUN, list(rules) or None)
    assert "error" not in found, found
    assert found["passed"] > (0 if rules else 20)  # it looked
    open_ones = [own for own in found["undecided"] if own["rule"] == "color-contrast"]
    found_out = contrasts(page, [own["target"] for own in open_ones])
    low = [own for own, value in zip(open_ones, found_out, strict=True) if value < 4.5]
    return [f"{own['rule']} at {own['target']}: {own['why']}" for own in found["violations"] + low]


def check(page, axe):
    """Check what is shown: everything in the light scheme, contrasts in the dark one."""
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")  # nothing beyond the screen
    paint(page, "light")
    assert faults(page, axe) == []
    paint(page, "dark")
    assert faults(page, axe, "color-contrast") == []


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_of_a_report(page, axe, told, width):  # noqa: F811
    with screen(page, width):
        page.open((told / "index.html").as_uri(), "queries/0")
        page.wait("return document.querySelectorAll('.query .t').length === 4")
        page.find(".query .tokens").send_keys("\ue014")  # a token's number beside it
        page.wait("return document.querySelector('.tip')")
        check(page, axe)
        for view in ("labels", "spectrum", "distributions", "groups", "store/damping"):
            page.go(view)
            page.run("const own = document.querySelector('details'); if (own) own.open = true")
            check(page, axe)


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_with_nothing_in_them(page, axe, told, tmp_path, width):  # noqa: F811
    """Nothing found, no queries, no curvature, a file that is missing."""
    with screen(page, width):
        page.open((told / "index.html").as_uri(), "queries/1")
        page.wait("return document.querySelectorAll('.card').length === 8")
        for field in ("#search", ".examples-filter"):
            find = "const own = document.querySelector(arguments[0]); own.value = 'not there';"
            page.run(f"{find} own.dispatchEvent(new Event('input'))", field)
        page.wait("return !document.querySelector('.card') && !document.querySelector('.line-of-list')")
        check(page, axe)
        bare = make_store(tmp_path / "t.zarr", random_rows(30, 8))
        report = write_report(bare, tmp_path / "r", curvature=False)
        page.open((report / "index.html").as_uri(), "queries")
        for view in ("queries", "groups", "spectrum", "labels"):
            page.go(view)
            check(page, axe)
        (report / "data" / "index.js").unlink()
        page.open((report / "index.html").as_uri())
        check(page, axe)


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_that_are_served(page, axe, server, width):  # noqa: F811
    with screen(page, width):
        page.open(server.url, "ask")
        check(page, axe)
        for text, shown in ((typed(70), "#answer .card"), ("no numbers", "#answer .notice")):
            page.fill("#ask-text", text)
            page.find("button.main").click()
            page.wait("return document.querySelector(arguments[0])", shown)
            check(page, axe)
