"""A headless Chromium for tests of pages, and stores with texts to show in it."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
from conftest import random_rows, whole_mask

from ooc_influence import GradientStore, Storage, fit_fisher

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    '"><img src=x onerror="window.hacked = 3">',
    "' onmouseover='window.hacked = 4' autofocus onfocus='window.hacked = 5",
    "javascript:window.hacked = 6",
    "before\u2028window.hacked = 7\u2029after",
    "--> <!-- ]]> ${window.hacked = 8} {{ 7 * 7 }} {% raw %} \\u003cscript\\u003e",
    "__proto__",
    '=HYPERLINK("http://example.invalid","x")',
    "<svg/onload=window.hacked=9><iframe srcdoc='<script>parent.hacked=10</script>'>",
    'ordinary, with "quotes" and\nlines',
    "\ud800 a lone surrogate, \x00 a zero",
]


def make_store(path, rows, *, ids=None, labels=None, sources=None, like=None):
    """A store with ids and columns; fitted unless it is one of queries."""
    columns = {"label": "str", "source": "str"} if labels is not None else {}
    kind = None if ids is None else "str"
    storage = Storage(chunk_rows=512, group_chunks=4)
    with GradientStore.create(path, whole_mask(rows.shape[1]), dtype="float32", storage=storage, ids=kind,
                              columns=columns) as store:  # fmt: skip
        values = {"columns": {"label": labels, "source": sources}} if columns else {}
        store.append(rows, loss=np.linspace(0.1, 3, len(rows)), ids=ids, **values)
    if like is None:
        fit_fisher(path)
    return GradientStore.open(path)


def hostile_pair(folder):
    """Train and query stores whose ids, labels, sources and texts try to run; with files of their texts."""

    def clean(text):  # what a store's strings can hold
        return text.encode("utf-8", "replace").decode().replace("\x00", "")

    made = []
    for name, n, seed in (("train", 60, 0), ("query", 12, 1)):
        texts = [HOSTILE[row % len(HOSTILE)] for row in range(n)]
        ids = [f"{row} {clean(text)}" for row, text in enumerate(texts)]
        labels = [clean(HOSTILE[row % 5]) for row in range(n)]
        sources = [clean(HOSTILE[(row + 3) % 9]) for row in range(n)]
        rows = random_rows(n, 8, seed)
        made.append(make_store(folder / f"{name}.zarr", rows, ids=ids, labels=labels, sources=sources,
                               like=made[0] if made else None))  # fmt: skip
        records = ({"id": own, "text": f"{own}: {text}"} for own, text in zip(ids, texts, strict=True))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return made[1], made[0]


def find_browser():
    """Selenium's drivers, Chromium and its driver; skips with the reason where one of them is not there."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver: on Debian, apt-get install chromium chromium-driver")
    return webdriver, binary, driver


def start_browser(downloads):
    """Chromium without a window, its requests and messages logged; skips with the reason where it is not there."""
    webdriver, binary, driver = find_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update")
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "window-size=1280,900",
        *quiet,
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    behaviour = {"behavior": "allow", "downloadPath": str(downloads)}
    found.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    return found


class Page:
    """A page in the browser, and what it asked the network for."""

    def __init__(self, driver, downloads):
        self.driver, self.downloads = driver, downloads
        self.address = ""

    def open(self, address, view=""):
        self.driver.get("about:blank")
        self.logs()
        self.requests()
        self.address = address
        self.driver.get(f"{address}#/{view}")
        self.wait("return !document.getElementById('loading')")

    def go(self, view):
        self.driver.execute_script("location.hash = arguments[0]", f"#/{view}")
        name = view.split("/")[0]
        self.wait(f"return document.body.dataset.view === '{name}'")

    def run(self, script, *given):
        return self.driver.execute_script(script, *given)

    def wait(self, script, *given, seconds=20.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.run(script, *given)
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"never true: {script}\n{self.text()[:2000]}\n{self.logs()}")

    def text(self, selector="body"):
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((node) => node.innerText)", selector)

    def count(self, selector):
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def fill(self, selector, text):
        node = self.find(selector)
        node.clear()
        node.send_keys(text)

    def select(self, label, value):
        self.run(
            "const node = document.querySelector(`select[aria-label='${arguments[0]}']`); node.value = arguments[1];"
            "node.dispatchEvent(new Event('change'))", label, value,
        )  # fmt: skip

    def requests(self):
        """Addresses asked for since the page was opened."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found

    def logs(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def saved(self, name):
        """The text of a file that was downloaded."""
        path = self.downloads / name
        end = time.monotonic() + 20
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        text = path.read_bytes()
        path.unlink()
        return text
