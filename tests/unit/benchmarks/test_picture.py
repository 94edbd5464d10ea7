"""Pictures of results: the committed ones are what their JSON gives, and each benchmark shows its telling figures."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageChops, ImageStat

from benchmarks import picture as command
from benchmarks.charts import CHARTS
from benchmarks.heat_map import FONT_SIZE
from benchmarks.picture import picture
from benchmarks.plot import WIDTH

RESULTS = Path(command.__file__).parent / "results"
COMMITTED = sorted(RESULTS.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
# Pixels per character of a wide font (DejaVu Sans), and a tenth more.
CHARACTER = {"title": 9.3, "panel": 8.2, "note": 6.9, "": 7.7}


def stored(benchmark: str) -> Any:
    """One committed result."""
    return json.loads(next(iter(sorted(RESULTS.glob(f"{benchmark}_*.json")))).read_text())


def root_of(found: Any) -> ElementTree.Element:
    return ElementTree.fromstring(picture(found))


def texts(root: ElementTree.Element) -> list[str | None]:
    return [element.text for element in root.iter(f"{SVG}text")]


def bars(root: ElementTree.Element) -> list[str]:
    """Series of the bars, legend first."""
    return [bar.attrib["class"] for bar in root.iter(f"{SVG}rect") if bar.attrib["class"] != "page"]


def width_of(text: ElementTree.Element) -> float:
    smaller = re.match(r"font-size: ([\d.]+)px", text.attrib.get("style", ""))
    return CHARACTER[text.attrib["class"]] * len(text.text or "") * (float(smaller[1]) / FONT_SIZE if smaller else 1)


@pytest.mark.parametrize("svg", COMMITTED, ids=lambda svg: svg.stem)
def test_a_committed_picture_is_what_its_result_gives(svg: Path) -> None:
    found = json.loads(svg.with_suffix(".json").read_text(encoding="utf-8"))
    assert svg.read_bytes() == picture(found).encode()


@pytest.mark.parametrize("svg", COMMITTED, ids=lambda svg: svg.stem)
def test_no_text_of_a_committed_picture_is_cut(svg: Path) -> None:
    for text in ElementTree.fromstring(svg.read_text(encoding="utf-8")).iter(f"{SVG}text"):
        if "transform" in text.attrib:
            continue
        x, width = float(text.attrib["x"]), width_of(text)
        left = x - width if text.attrib["text-anchor"] == "end" else x
        assert 0 <= left < left + width <= WIDTH, text.text


@pytest.mark.parametrize("svg", COMMITTED, ids=lambda svg: svg.stem)
def test_a_committed_picture_is_shown_beside_its_tables(svg: Path) -> None:
    assert f"]({svg.name})" in svg.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "benchmark",
    [
        "capacity",
        "cascade",
        "decode_step",
        "early_shipping",
        "placement",
        "prefill_overhead",
        "quality",
        "second_question",
        "serve",
        "transfer",
    ],
)
def test_every_benchmark_that_has_results_has_a_committed_picture(benchmark: str) -> None:
    assert any(svg.stem.startswith(f"{benchmark}_") for svg in COMMITTED)


@pytest.mark.parametrize("benchmark", ["capacity", "decode_step"])
def test_the_roofline_has_a_bar_of_its_own(benchmark: str) -> None:
    found = stored(benchmark)
    roofline = found["roofline_throughput_ratio" if benchmark == "capacity" else "roofline_ratio"]
    root = root_of(found)
    assert texts(root)[-2:] == ["roofline", f"{roofline:.2f}"]
    assert bars(root)[-1] == "s0"


def test_a_gpu_gives_its_name_and_prefills_without_stages() -> None:
    runs = stored("prefill_overhead")
    with_stages = len(bars(root_of(runs)))
    for run in runs:
        del run["stage_shares"], run["stages_cpu_ms"]
        run["device"] = "A Fast One"
    root = root_of(runs)
    assert with_stages - len(bars(root)) == 3 * len(runs)
    assert any((text or "").startswith("A Fast One; commit ") for text in texts(root))
    assert {"2 KV heads", "8 KV heads"} <= set(texts(root))


def vl_cache_alone() -> Any:
    """The stored result as if one policy had been measured, at retention 1 and 0.1."""
    found = stored("quality")
    full = [{**row, "policy": "vl_cache"} for row in found["results"] if row["policy"] == "full"]
    kept = [row for row in found["results"] if (row["policy"], row["retention"]) == ("vl_cache", 0.1)]
    return {**found, "results": [*full, *kept]}


def test_one_policy_is_shown_by_task() -> None:
    found = vl_cache_alone()
    tasks = {row["task"] for row in found["results"]}
    root = root_of(found)
    assert tasks <= set(texts(root))
    legend = 2
    assert len(bars(root)) == legend + len(found["results"])


def with_another(found: Any) -> Any:
    other = [{**row, "policy": "other", "exact_match": 0.123} for row in found["results"]]
    return {**found, "results": [*found["results"], *other]}


def test_several_policies_are_shown_by_retention_and_by_task_the_best_first() -> None:
    found = vl_cache_alone()
    full = [{**row, "policy": "full"} for row in found["results"] if row["retention"] == 1]
    several = with_another(found)
    shown = texts(root_of({**several, "results": [*full, *several["results"]]}))
    labels = [text for text in shown if text in ("vl_cache", "other", "full")]
    assert labels == ["vl_cache", "other", "full", "vl_cache", "other"]
    tasks = list(dict.fromkeys(row["task"] for row in found["results"]))
    kept = {row["task"]: f"{100 * row['exact_match']:.0f}" for row in found["results"] if row["retention"] < 1}
    line = shown[len(shown) - 1 - shown[::-1].index("vl_cache") + 1 :][: len(tasks)]
    assert line == [kept[task] for task in tasks]
    assert shown[-len(tasks) :] == len(tasks) * ["12"]


def test_a_darker_cell_is_a_higher_share() -> None:
    root = root_of(with_another(vl_cache_alone()))
    cells = [cell for cell in root.iter(f"{SVG}rect") if "fill-opacity" in cell.attrib]
    shades = [float(cell.attrib["fill-opacity"]) for cell in cells]
    numbers = [text.text for text in root.iter(f"{SVG}text") if text.attrib["text-anchor"] == "middle"]
    pairs = sorted(zip(map(float, map(str, numbers)), shades, strict=True))
    assert all(0 < low[1] <= high[1] < 1 for low, high in itertools.pairwise(pairs) if low[0] < high[0])
    assert len(set(shades)) > 5


def test_small_retentions_have_columns_for_several_images() -> None:
    found = vl_cache_alone()
    small = [{**row, "retention": 0.01} for row in found["results"] if row["retention"] < 1]
    shown = texts(root_of(with_another({**found, "results": [*found["results"], *small]})))
    assert shown.index("0.01") < shown.index("0.01, 2+ images") < shown.index("vl_cache")
    several = [row["exact_match"] for row in small if row["task"] in ("which", "read_in_image", "read_in_four")]
    assert f"{100 * sum(several) / 3:.0f}" in shown[shown.index("vl_cache") :][:4]


def test_no_cell_or_label_of_a_long_table_is_outside() -> None:
    found = vl_cache_alone()
    name = "oracle:base=vl_cache,budget=uniform,shared_heads=true"
    long = [{**row, "policy": name} for row in found["results"]]
    root = root_of({**found, "results": [*found["results"], *long]})
    cells = [cell for cell in root.iter(f"{SVG}rect") if "fill-opacity" in cell.attrib]
    assert max(float(cell.attrib["x"]) + float(cell.attrib["width"]) for cell in cells) <= WIDTH
    assert max(float(cell.attrib["y"]) + float(cell.attrib["height"]) for cell in cells) <= float(root.attrib["height"])
    labels = [text for text in root.iter(f"{SVG}text") if text.text == name]
    assert all(float(label.attrib["x"]) - width_of(label) >= 0 for label in labels)


def test_more_tasks_than_have_room_are_refused() -> None:
    found = with_another(stored("quality"))
    more = [{**row, "task": f"another {number}"} for row in found["results"][:1] for number in range(3)]
    with pytest.raises(ValueError, match="12 columns at most have room, not 1"):
        picture({**found, "results": [*found["results"], *({**row, "retention": 0.1} for row in more)]})


def test_serving_has_a_bar_per_load_retention_and_quantity() -> None:
    found = stored("serve")
    root = root_of(found)
    assert {"retention 1", "retention 0.1", "2 clients", "8 clients", "3.19", "6449"} <= set(texts(root))
    legend, quantities = 2, 3
    assert len(bars(root)) == legend + quantities * len(found["results"])


def test_what_nobody_answered_has_no_bar() -> None:
    found = stored("serve")
    found["results"][0] |= {"median_ttft_ms": None, "request_goodput": None}
    found["workload"]["goodput"] = []
    assert texts(root_of(found)).count("none") == 2
    assert "goodput within no objective: requests/s" in texts(root_of(found))


@pytest.mark.parametrize(
    "runs",
    [
        [],
        {"benchmark": "dance"},
        [{"benchmark": "capacity"}, {"benchmark": "serve"}],
        [{"benchmark": "capacity"}, {"benchmark": "capacity"}],
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "a.json"
    result.write_text(json.dumps(runs))
    monkeypatch.setattr(sys, "argv", ["picture", str(result), "--svg", str(tmp_path / "a.svg")])
    with pytest.raises(SystemExit, match=r"^no picture of .*a\.json: [a-z]+ .*(needed|run)"):
        command.main()
    assert not (tmp_path / "a.svg").exists()


def test_the_command_draws_a_stored_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tmp_path / "a.svg"
    monkeypatch.setattr(sys, "argv", ["picture", str(COMMITTED[0].with_suffix(".json")), "--svg", str(drawn)])
    command.main()
    assert drawn.read_bytes() == COMMITTED[0].read_bytes()


@pytest.mark.parametrize("stored", sorted(RESULTS.glob("*.png")), ids=lambda stored: stored.stem)
def test_a_committed_png_shows_its_result(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py", reason="needs the extra png")
    drawn = tmp_path / "a.png"
    monkeypatch.setattr(sys, "argv", ["picture", str(stored.with_suffix(".json")), "--png", str(drawn)])
    command.main()
    with Image.open(drawn) as one, Image.open(stored) as other:
        assert one.width == 2 * WIDTH
        # another version of the library may round edges otherwise
        assert ImageStat.Stat(ImageChops.difference(one.convert("RGB"), other.convert("RGB"))).mean < [1.0] * 3


def test_letters_are_drawn() -> None:
    pytest.importorskip("resvg_py", reason="needs the extra png")
    found = stored("quality")
    named, nameless = (io.BytesIO(command.in_pixels(svg)) for svg in (picture(found), _without_text(picture(found))))
    with Image.open(named) as one, Image.open(nameless) as other:
        assert ImageChops.difference(one.convert("L"), other.convert("L")).getbbox() is not None


def _without_text(svg: str) -> str:
    return re.sub(r">[^<>]*</text>", "></text>", svg)


def test_pixels_without_their_extra_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.raster", None)
    drawn = tmp_path / "a.png"
    monkeypatch.setattr(sys, "argv", ["picture", str(COMMITTED[0].with_suffix(".json")), "--png", str(drawn)])
    with pytest.raises(SystemExit, match=r"pixels need resvg: pip install '\.\[png\]'"):
        command.main()
    assert not drawn.exists()


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="--svg FILE, --png FILE or both"):
        command.PictureConfig(result=COMMITTED[0])


def test_charts_are_named_as_their_benchmarks() -> None:
    for name in CHARTS:
        assert (RESULTS.parent / f"{name}.py").exists() or (RESULTS.parent / name / "__main__.py").exists()
