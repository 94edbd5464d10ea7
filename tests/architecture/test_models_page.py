"""The page of models says of refused policies and of KV what code and arithmetic say."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.compression.windows import check_policy
from prefill_worker.preprocess.families import FAMILIES
from shared.errors import InvalidRequestError
from shared.kv.layout import KVLayout

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
KIB, MIB = 1 << 10, 1 << 20


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    lines = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.parametrize("row", rows("KV per model"), ids=lambda row: row[0])
def test_kv_is_what_the_configuration_gives(row: list[str]) -> None:
    layers, heads, width, per_token, visual = (int(cell.replace(",", "")) for cell in row[1:6])
    layout = KVLayout(num_layers=layers, num_kv_heads=heads, head_dim=width, dtype="bfloat16")
    assert layout.token_bytes == per_token * KIB
    assert float(row[6]) == pytest.approx(layout.full_bytes(visual) / MIB, abs=0.051)
    assert float(row[7]) == pytest.approx(layout.full_bytes(visual) / MIB / 10, abs=0.051)


def test_every_family_is_named() -> None:
    assert {row[1].strip("`") for row in rows("Families")} == set(FAMILIES)


def test_policies_that_know_no_windows_are_named() -> None:
    windowed = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", windows=(8,))
    section = PAGE.split("## Sliding windows")[1].split("\n## ")[0]
    for name in POLICIES:
        try:
            check_policy(build_policy(name, {}), windowed)
            refused = False
        except InvalidRequestError:
            refused = True
        assert (f"`{name}`" in section) == refused, name
