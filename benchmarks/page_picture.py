"""Draw the picture of the page that `packforcing serve` has, from a session with the demo model.

    python -m benchmarks.page_picture --out docs/serve.png

Begins a video in Chromium, switches its prompt twice and takes a picture after `BLOCKS` blocks.
Needs the extra `serve`, Playwright and a Chromium that plays H.264.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

SEED = 11
PROMPTS = {  # by the block they are switched at
    0: "a blue square over sand dots",
    24: "a red star over sand dots",
    44: "a yellow star over navy stripes",
}
BLOCKS = 72
SIZE = {"width": 1280, "height": 860}
PATIENCE_MS = 600_000


def take_picture(url: str, scheme: str) -> bytes:
    """Steer a live video on the page, and return a PNG of it.

    Args:
        url: Of a server.
        scheme: "light" or "dark".
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.wait_for_selector("[data-state=empty]")
        page.fill("#seed", str(SEED))
        for block, prompt in PROMPTS.items():
            if block:
                page.wait_for_selector(f"#reads-readout:has-text('Block {block} ')")
            page.fill("#prompt", prompt)
            page.press("#prompt", "Enter")
        page.wait_for_selector(f"#reads-readout:has-text('Block {BLOCKS} ')")
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        return page.screenshot()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    parser.add_argument("--scheme", choices=("light", "dark"), default="dark")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "packforcing.app.cli", "serve", "--port", "0"]
        with subprocess.Popen(
            [*command, "--out", folder], stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout
            try:
                picture = take_picture(server.stdout.readline().strip(), args.scheme)
            finally:
                server.terminate()
    Image.open(io.BytesIO(picture)).convert("RGB").save(args.out, optimize=True)


if __name__ == "__main__":
    main()
