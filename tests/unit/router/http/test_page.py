"""docs/openai.md knows every field and flag, and no others."""

from __future__ import annotations

import re

import pytest

from router.config import RouterConfig
from router.http.app import make_app
from router.http.errors import CODES, STATUSES, STATUSES_BY_REASON
from router.http.fields import REFUSED
from router.http.schema import ChatRequest, Wire
from tests.unit.router.test_process import ROOT

PAGE = (ROOT / "docs" / "openai.md").read_text()
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
WORDS = {word for code in re.findall(r"`([^`]+)`", PROSE) for word in re.findall(r"\w+", code)}


@pytest.mark.parametrize("field", [*ChatRequest.model_fields, *Wire.model_fields])
def test_every_field_is_there(field: str) -> None:
    assert field in WORDS


def test_what_is_refused_is_no_field() -> None:
    assert not REFUSED.keys() & ChatRequest.model_fields.keys()
    said = re.search(r"\*\*Refused\*\*.*?nothing\.", PAGE, re.DOTALL)
    assert said
    named = set(re.findall(r"`(\w+)`", said[0])) - {"unsupported_field"}
    assert named <= REFUSED.keys()
    assert len(named) > 10


def test_every_flag_exists() -> None:
    flags = re.findall(r"`--(http-[\w-]+|image-[\w-]+|ui)\b", PAGE)
    assert len(set(flags)) == 4
    for flag in flags:
        assert flag.replace("-", "_") in RouterConfig.__dataclass_fields__


def test_every_status_is_there() -> None:
    table = PAGE[PAGE.index("| status |") :]
    for status in {*STATUSES.values(), *STATUSES_BY_REASON.values()} - {499}:
        assert str(status) in table
    assert all(f"`{code}`" in table for code in CODES.values())


def test_every_path_is_there() -> None:
    app = make_app(None, None, None, is_ready=lambda: True, ui=True)  # type: ignore[arg-type]
    for route in app.routes:
        path = route.path.partition("/{")[0]
        # below /ui are the files of that page
        assert path in PAGE or path.startswith("/ui/")
