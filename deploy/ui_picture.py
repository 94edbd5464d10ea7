"""`python -m deploy.ui_picture --out docs/page.png`: the router's page after two questions, as Chromium shows it.

Starts a service of its own for it. Needs `chromium`.
"""

from __future__ import annotations

import asyncio
import functools
import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image
from playwright.async_api import Page, async_playwright, expect

from deploy.local.stack import EXIT_FAILED, Stack, StackConfig, run_stack
from models.shapes_vlm.paths import SAMPLES

# Names lead nowhere: what the page needs, it has from the router.
ARGUMENTS = ("--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
QUESTIONS = (
    ("What does the yellow plate say?", ["scene_1.png"], 5),
    ("What is the code on the purple plate in image 2?", ["scene_3.png"], 10),
)
WIDTH, HEIGHT = 1240, 900
# Flat colours with little noise: as good as all of them at a third of the bytes.
COLORS = 255


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """Draw the page."""

    out: Path
    """PNG file."""


def browser_options() -> dict[str, Any]:
    """How the machine's Chromium is started.

    Raises:
        ValueError: There is none.
    """
    path = shutil.which("chromium")
    if path is None:
        raise ValueError("the page is drawn by Chromium: apt install chromium")
    return {"executable_path": path, "args": list(ARGUMENTS)}


async def draw(stack: Stack, out: Path) -> int:
    """Asks, and writes the picture; returns the exit code."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(**browser_options())
        page = await browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        await page.goto(stack.page_url)
        for question, images, percent in QUESTIONS:
            await _ask(page, question, images, percent)
        shot = await page.screenshot(full_page=True)
        await browser.close()
    with Image.open(io.BytesIO(shot)) as image:
        image.convert("RGB").quantize(COLORS).save(out, optimize=True)
    return 0


async def _ask(page: Page, question: str, images: list[str], percent: int) -> None:
    await expect(page.locator("#policy")).not_to_be_empty()
    await page.select_option("#policy", "recommended")
    await page.fill("#retention", str(percent))
    await page.set_input_files("#files", [SAMPLES / name for name in images])
    await page.fill("#question", question)
    await page.click("#go")
    await expect(page.locator("#go")).to_be_enabled(timeout=60_000)
    await expect(page.locator("#layers")).to_be_visible()


def main(config: PictureConfig) -> int:
    """Returns the exit code."""
    try:
        browser_options()
    except ValueError as error:
        raise SystemExit(str(error)) from error
    job = functools.partial(draw, out=config.out.resolve())
    return asyncio.run(run_stack(StackConfig(ui=True, http_port=0), job, interrupted=EXIT_FAILED))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PictureConfig, description=__doc__)))
