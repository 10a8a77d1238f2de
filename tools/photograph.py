r"""Photograph a report's page in a headless Chromium: docs/img/page.png, the picture in the README.

It shows an answer of the planted facts (tools/experiments/facts.py, which says where the model comes from): a chat
model's answer about an invented mineral, and the two documents that taught it, token by token. Its page::

    python tools/experiments/facts.py --model smol --only defaults
    ooc-influence trace --model facts-output/adapter --data facts-output/train.jsonl \
        --queries facts-output/query.jsonl --token-rows 3 -o planted-facts

Run: python tools/photograph.py planted-facts/page [--view queries/23] [--size 1280x1040] [--dark] [--out FILE].
Needs chromium, chromedriver, selenium, and the extra report.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pages import Page, start_browser  # of the tests

ROOT = Path(__file__).resolve().parent.parent
COLOURS = 256  # of the palette: the letters' edges and a few tints


def photograph(folder: Path, view: str, size: tuple[int, int], scheme: str) -> Image.Image:
    """Return what a browser window of this size shows of a report's view."""
    width, height = size
    with tempfile.TemporaryDirectory() as downloads:
        driver = start_browser(downloads)
        try:
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
            page = Page(driver, Path(downloads))
            page.open((folder / "index.html").resolve().as_uri(), view)
            page.wait("return document.querySelector('main h2')")
            time.sleep(0.5)  # until images and fonts have been drawn
            shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        finally:
            driver.quit()
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path, help="a report's folder")
    parser.add_argument("--view", default="queries/23", help="the page's address after #/")
    parser.add_argument("--size", default="1280x1040", help="of the window, in pixels")
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img" / "page.png", help="the PNG to write")
    options = parser.parse_args()
    width, height = (int(part) for part in options.size.split("x"))
    picture = photograph(options.page, options.view, (width, height), "dark" if options.dark else "light")
    picture.quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
