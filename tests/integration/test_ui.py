"""The page as its readers have it: a real browser, real processes, TLS, a token, and no other network."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vlcache
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from deploy.local.forks import Forks
from deploy.ui_picture import browser_options
from models.shapes_vlm.paths import SAMPLES
from tests.integration.conftest import stack_config
from tests.integration.running_stack import RunningStack

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium"),
]

SAMPLE = SAMPLES / "scene_1.png"
QUESTION = "What does the yellow plate say?"
# What a browser says of every refused request, and of these tests' own look at pixels.
EXPECTED = ("server responded with a status of 4", "Canvas2D: Multiple readback")
PHONE = {"width": 360, "height": 740}

DROP = """([name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (byte) => byte.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type: "image/png" }));
  const options = { dataTransfer, bubbles: true, cancelable: true };
  document.querySelector("#drop").dispatchEvent(new DragEvent("drop", options));
}"""
# The share of an image's pixels that its overlay shows clear.
CLEAR = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, at) => at % 4 === 3 && value > 0).length / (data.length / 4);
}"""
# Visible texts with a contrast below WCAG's AA, with their colours; what is disabled need not have it.
PALE = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = parse(color).map((each) => each / 255);
    const linear = [r, g, b].map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((parse(color)[3] ?? 1) > 0) return color;
    }
  };
  const texts = [...document.body.querySelectorAll("*")].filter((element) => {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    return own && element.checkVisibility() && !element.disabled;
  });
  const pairs = texts.map((element) => [element, getComputedStyle(element).color, ground(element)]);
  const contrast = ([, ink, paper]) => {
    const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const pale = pairs.filter((pair) => contrast(pair) < 4.5);
  return [pairs.length, pale.map(([element, ...colors]) => [element.outerHTML, ...colors])];
}"""


@pytest.fixture(scope="module")
def stack(forks: Forks) -> Iterator[RunningStack]:
    with RunningStack(stack_config("auto", secure=True, http_port=0, ui=True), forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**browser_options())
        yield browser
        browser.close()


class Reader:
    """Somebody with the page before them; what the browser had to complain about is an error at the end."""

    def __init__(self, browser: Browser, stack: RunningStack, **options: Any) -> None:
        self.stack, self.url = stack, stack.base_url.removesuffix("v1")
        # the CA is the stack's own
        self.page: Page = browser.new_context(ignore_https_errors=True, **options).new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self.complaints.append(said.text))
        self.page.goto(f"{self.url}ui")

    def enter(self, token: str) -> None:
        self.page.fill("#token", token)
        self.page.press("#token", "Enter")

    def come_in(self) -> None:
        self.enter(self.stack.credentials.token)
        expect(self.page.locator("#policy option")).not_to_have_count(0)

    def ask(self, question: str = QUESTION) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        expect(self.page.locator("#go")).to_be_enabled()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def bytes_of(self, row: str) -> float:
        number, unit = self.text(f"#bars div:has(.{row}) dd").split()
        return float(number) * {"bytes": 1, "KiB": 1024, "MiB": 1024**2}[unit]

    def clear(self, number: int = 0) -> float:
        return self.page.locator(".picture .kept").nth(number).evaluate(CLEAR)


@pytest.fixture
def reader(browser: Browser, stack: RunningStack) -> Iterator[Reader]:
    reader = Reader(browser, stack)
    yield reader
    assert all(url.startswith(reader.url) for url in reader.requests), reader.requests
    assert [said for said in reader.complaints if not any(each in said for each in EXPECTED)] == []
    reader.page.context.close()
    stack.wait_idle()


def drop(reader: Reader, file: Path) -> None:
    reader.page.evaluate(DROP, [file.name, base64.b64encode(file.read_bytes()).decode()])
    expect(reader.page.locator(f"#images li[title='{file.name}']")).to_be_visible()


def test_a_token_is_asked_for_and_kept_for_the_tab(reader: Reader) -> None:
    page, trouble = reader.page, reader.page.locator("#trouble")
    expect(trouble).to_have_text("The router wants a token before it answers.")
    expect(page.locator("#token")).to_be_focused()
    reader.enter("wrong")
    expect(trouble).to_have_text("The router does not know this token.")
    reader.come_in()
    expect(trouble).to_be_hidden()
    page.reload()
    expect(page.locator("#policy option")).not_to_have_count(0)
    expect(page.locator("#entrance")).to_be_hidden()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_what_is_kept_follows_the_slider(reader: Reader) -> None:
    reader.come_in()
    drop(reader, SAMPLE)
    reader.ask()
    with reader.stack.client() as client:
        expected = client.generate(QUESTION, images=[SAMPLE], compression=vlcache.Compression(explain=True))
    assert reader.text("#text") == expected.text
    assert reader.text("#tokens") == str(expected.usage.generated_tokens)
    assert all(reader.text(f"#{time}").endswith(("ms", " s")) for time in ("ttft", "itl", "e2e"))
    full, kept, sent = (reader.bytes_of(row) for row in ("full", "kept", "sent"))
    assert kept == pytest.approx(expected.compression.kept_bytes, rel=0.01)
    assert kept < sent < 0.12 * full
    assert reader.text("#saved") == "90 % of the KV saved"
    grid = expected.compression.kept.images[0].tokens
    patches = [sum(layer[token] for layer in expected.compression.kept.layers) for token in grid]
    assert reader.clear() == pytest.approx(sum(map(bool, patches)) / len(patches), abs=0.01)
    reader.page.fill("#retention", "50")
    assert reader.text("#share") == "50 %"
    few = reader.clear()
    reader.ask()
    assert reader.bytes_of("kept") > 4 * kept
    assert reader.clear() > 2 * few
    before = reader.page.locator("#entries button")
    expect(before).to_have_count(2)
    before.last.click()
    assert reader.clear() == few
    expect(before.last).to_be_focused()


def test_layers_are_walked_through_with_the_keyboard(reader: Reader) -> None:
    reader.come_in()
    drop(reader, SAMPLE)
    reader.ask()
    assert reader.text("#layer").startswith("All layers, on average: ")
    every = reader.clear()
    reader.page.focus("#columns input:checked")
    said = set()
    for number in range(8):
        reader.page.keyboard.press("ArrowRight")
        assert reader.text("#layer").startswith(f"Layer {number}: ")
        assert 0 < reader.clear() <= every
        said.add(reader.text("#layer"))
    assert len(said) > 4
    reader.page.check("#whole")
    expect(reader.page.locator(".picture .kept")).to_be_hidden()


def test_several_images_and_another_policy(reader: Reader) -> None:
    reader.come_in()
    reader.page.set_input_files("#files", [SAMPLES / f"scene_{number}.png" for number in (1, 2, 3)])
    reader.page.get_by_role("button", name="Remove scene_2.png").click()
    expect(reader.page.locator("#images li")).to_have_count(2)
    reader.page.select_option("#policy", "recommended")
    reader.ask("What is the code on the purple plate in image 2?")
    assert "RK36HF" in reader.text("#text")
    assert reader.text("#how").startswith("look_ahead, ")
    expect(reader.page.locator(".picture .kept")).to_have_count(2)
    assert reader.clear(0) != reader.clear(1)
    # at once, while they are opened
    reader.page.set_input_files("#files", [SAMPLES / f"scene_{number}.png" for number in (4, 5, 6)])
    reader.ask()
    expect(reader.page.locator(".picture .kept")).to_have_count(5)
    # shorter than it looks ahead
    reader.ask("Read the purple plate in image 2.")
    assert reader.text("#state").endswith("nothing was dropped.")
    assert not any(reader.page.locator(each).is_visible() for each in ("#bytes", "#legend", "#layers"))


@pytest.mark.parametrize("way", ["key", "button"])
def test_an_answer_is_stopped(reader: Reader, way: str) -> None:
    def for_long(route: Route) -> None:
        asked = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps(asked | {"ignore_eos": True}))

    reader.come_in()
    reader.page.route("**/v1/chat/completions", for_long)
    reader.page.fill("#most", "4000")
    reader.page.fill("#question", "Hello?")
    reader.page.press("#question", "Enter")
    expect(reader.page.locator("#text")).not_to_be_empty()
    if way == "key":
        reader.page.keyboard.press("Escape")
    else:
        reader.page.click("#stop")
    expect(reader.page.locator("#state")).to_have_text("Stopped.")
    expect(reader.page.locator("#go")).to_be_enabled()
    expect(reader.page.locator("#bytes")).to_be_hidden()
    reader.stack.wait_idle(5)


def test_errors_are_sentences_and_texts_are_no_markup(reader: Reader, tmp_path: Path) -> None:
    reader.come_in()
    trouble, broken = reader.page.locator("#trouble"), tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    reader.page.set_input_files("#files", broken)
    expect(trouble).to_have_text("broken.png is no PNG, JPEG or WebP image.")
    reader.ask("word " * 9000)
    expect(trouble).to_contain_text("tokens")
    expect(reader.page.locator("#state")).to_have_text("Failed.")
    reader.ask("<img src=x onerror=alert(1)>")
    expect(trouble).to_be_hidden()
    assert reader.text("#asked") == "<img src=x onerror=alert(1)>"
    expect(reader.page.locator("#answer img, #history img")).to_have_count(0)


def test_a_router_that_is_gone_is_an_error_in_words(reader: Reader) -> None:
    reader.come_in()
    reader.page.route("**/v1/**", lambda route: route.abort())
    reader.ask()
    expect(reader.page.locator("#trouble")).to_have_text("The router cannot be reached.")
    reader.complaints[:] = [said for said in reader.complaints if "ERR_FAILED" not in said]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Browser, stack: RunningStack, scheme: str, tmp_path: Path) -> None:
    reader = Reader(browser, stack, viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True)
    page = reader.page
    expect(page.locator("#trouble")).to_be_visible()
    assert page.evaluate(PALE)[1] == []
    reader.come_in()
    drop(reader, SAMPLE)
    reader.ask()
    reader.ask("What is below the black circle?")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    expect(page.locator("#text")).to_be_in_viewport()
    texts, pale = page.evaluate(PALE)
    assert texts > 30
    assert pale == []
    shot = page.screenshot(full_page=True, path=tmp_path / f"{scheme}.png")
    assert shot.startswith(b"\x89PNG")
    page.context.close()
