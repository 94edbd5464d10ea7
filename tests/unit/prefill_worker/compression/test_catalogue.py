"""The table of policies in the guide says what the classes say."""

from __future__ import annotations

import pytest

from prefill_worker.compression.catalogue import GUIDE, policy_table, with_table
from prefill_worker.compression.registry import POLICIES

ROWS = {
    line.split("`")[1]: [cell.strip() for cell in line.split("|")[1:-1]] for line in policy_table().splitlines()[2:]
}


def test_the_guide_is_up_to_date() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    assert with_table(guide) == guide, "run python -m prefill_worker.compression.catalogue"


def test_a_guide_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError):
        with_table("no table here")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_line_that_says_where_it_comes_from(name: str) -> None:
    file, idea, paper, *rest = ROWS[name]
    assert (GUIDE.parent / file.split("(")[1].rstrip(")")).is_file()
    assert idea
    assert len(rest) == 4
    assert "arXiv" in paper or "baseline" in paper


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("vl_cache", ["post-vision rows", "layer", "-"]),
        ("streaming_llm", ["nothing", "-", "-", "`sinks=4`"]),
        ("snap_kv", ["last 32 rows", "-", "-", "`window=32` `kernel=5` `pooling=avg`"]),
        ("h2o", ["all rows or probe rows", "-", "goes on while tokens are generated", "`rows=all` `recent_share=0.5`"]),
        ("ada_kv", ["last 32 rows", "head", "-"]),
        ("d2o", ["all rows or probe rows", "layer", "merges dropped tokens, goes on while tokens are generated"]),
        ("kv_sharer", ["post-vision rows", "layer", "changes the pass, goes on while tokens are generated"]),
        ("fast_v", ["last row", "layer", "changes the pass"]),
    ],
)
def test_what_a_line_says(name: str, cells: list[str]) -> None:
    assert ROWS[name][3 : 3 + len(cells)] == cells
