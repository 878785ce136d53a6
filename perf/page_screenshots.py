# SPDX-License-Identifier: Apache-2.0
"""The pictures in docs/page.md, from a server that runs, with some load beside the answer that they show.

./build.sh serve --openai_port 9000
python -m perf.page_screenshots http://127.0.0.1:9000/
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
QUESTIONS = (
    "What is the capital of Japan?",
    "Give me three tips for clear writing, with the key word of each in bold.",
)
VIEWS = {
    "page": {"viewport": {"width": 1200, "height": 760}, "color_scheme": "light"},
    "page-phone": {"viewport": {"width": 390, "height": 760}, "color_scheme": "dark", "is_mobile": True},
}
NUM_NEIGHBOURS = 3
COLOURS = 128  # of a picture's palette, which makes its file a third of the size
ANSWER_SECONDS = 300


class Load:
    """A few requests that run all the time inside a `with` block, so that the charts show something."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(NUM_NEIGHBOURS)]

    def _ask(self, number: int) -> None:
        while not self._done.wait(2 * number):
            body = {"prompt": f"Story {number}: once upon a time", "max_tokens": 60 + 40 * number, "ignore_eos": True}
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{self._url}v1/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                response.read()

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *exception: object) -> None:
        self._done.set()


def picture(browser: Browser, url: str, name: str) -> None:
    """Hold a short conversation and save what the page then looks like."""
    page = browser.new_page(device_scale_factor=2, **VIEWS[name])
    page.set_default_timeout(1000 * ANSWER_SECONDS)
    page.goto(url)
    page.locator("#temperature").fill("0")
    for question in QUESTIONS:
        page.get_by_label("Your prompt").fill(question)
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Try again").wait_for()
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    palette = image.quantize(COLOURS, dither=Image.Dither.NONE)
    palette.save(IMAGES / f"{name}.png", optimize=True)
    page.close()


def main() -> None:
    url = sys.argv[1].rstrip("/") + "/"
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright, Load(url):
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), chromium_sandbox=os.geteuid() != 0
        )
        for name in VIEWS:
            picture(browser, url, name)
        browser.close()


if __name__ == "__main__":
    main()
