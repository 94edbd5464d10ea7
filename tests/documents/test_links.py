"""What the documents lead to is there: files, headings of pages, and the paths that they name."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.documents.pages import PAGES, ROOT, text_of, without_blocks

RESULTS = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "benchmarks/results").glob("*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Names of folders at the top, and what is made there and not kept.
TOP = "benchmarks|client|decode_worker|deploy|docs|models|prefill_worker|proto|router|shared|tests"
PATH = re.compile(rf"`((?:{TOP})/[\w./-]+)`")
MADE = ("docs/explain.png",)


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text_of(page)), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", *RESULTS])
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for link in LINK.findall(without_blocks(text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), link


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_a_page_names_exist(page: str) -> None:
    named = set(PATH.findall(without_blocks(text_of(page))))
    gone = {path for path in named if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()}
    assert gone - set(MADE) == set()


def test_files_of_the_recipes_exist() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = set(re.findall(r"`([\w/]+\.(?:py|proto))`", text_of("CONTRIBUTING.md")))
    assert len(named) > 10
    assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in tracked)] == []


def test_every_page_is_found_from_the_readme() -> None:
    linked = set(LINK.findall(text_of("README.md")))
    listed = subprocess.run(["git", "ls-files", "docs/*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) - linked == set()


def test_anchors_are_those_of_github() -> None:
    assert "answers-of-a-given-form" in anchors("client/README.md")
    assert "metrics-dashboards-alerts" in anchors("docs/operations.md")
