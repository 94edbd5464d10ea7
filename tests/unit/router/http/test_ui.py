"""The page's files: served only when asked for, under a strict policy, and with nothing from elsewhere."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from router.http.page import FOLDER, TYPES
from tests.unit.router.fakes import run
from tests.unit.router.http.served import error_of, served

FILES = sorted(FOLDER.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
INDEX = (FOLDER / "index.html").read_text()
# The name of SVG itself, which nobody loads.
NAMESPACE = "http://www.w3.org/2000/svg"
MAX_LINES = 260

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def address(file: Path) -> str:
    return "/ui" if file.name == "index.html" else f"/ui/{file.name}"


def test_there_is_no_page_unless_somebody_wants_it() -> None:
    async def main() -> None:
        async with served() as s:
            for file in FILES:
                assert error_of(await s.client.get(address(file)))["code"] == "not_found"

    run(main)


def test_every_file_comes_with_its_type_and_the_policy(tmp_path: Path) -> None:
    """Without a token: nobody could enter one."""
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(f"red {hashlib.sha256(b'secret').hexdigest()}\n")

    async def main() -> None:
        async with served(ui=True, api_tokens=tokens) as s:
            for file in FILES:
                response = await s.client.get(address(file))
                assert response.status_code == 200
                assert response.content == file.read_bytes()
                assert response.headers["content-type"].partition(";")[0] == TYPES[file.suffix]
                assert response.headers["x-content-type-options"] == "nosniff"
                policy = dict(each.split(" ", 1) for each in response.headers["content-security-policy"].split("; "))
                assert policy["default-src"] == policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
                assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
                assert policy["require-trusted-types-for"] == "'script'"
            for path in ("/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/page.py", "/ui/index.html"):
                assert (await s.client.get(path)).status_code == 404
            assert error_of(await s.client.post("/ui"))["code"] == "method_not_allowed"
            assert (await s.client.get("/v1/models")).status_code == 401

    run(main)


@each_file
def test_nothing_is_from_elsewhere(file: Path) -> None:
    text = file.read_text().replace(NAMESPACE, "")
    assert re.findall(r"https?:|[\"'(=]//|url\(|@import|@font-face|\bdata:(?:image|text)", text) == []


@each_file
def test_no_file_is_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


def test_markup_holds_no_script_and_no_style() -> None:
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", INDEX) == []
    assert re.findall(r"<script[^>]*>[^<]", INDEX) == []


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_texts_never_become_markup(file: Path) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|localStorage"
    assert re.findall(forbidden, file.read_text()) == []


def test_every_file_is_used_and_every_element_exists() -> None:
    scripts = "".join(file.read_text() for file in SCRIPTS)
    used = set(re.findall(r'(?:href|src)="ui/([^"]+)"', INDEX)) | set(re.findall(r'from "\./([^"]+)"', scripts))
    assert used == {file.name for file in FILES} - {"index.html"}
    ids = re.findall(r'\bid="([^"]+)"', INDEX)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\bthe\("([^"]+)"\)', scripts)) <= set(ids)
    assert set(re.findall(r'(?:for|form|aria-labelledby|aria-describedby)="([^"]+)"', INDEX)) <= set(ids)
