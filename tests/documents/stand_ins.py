"""What the commands of the documents are given where they name something that only their reader has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.documents.pages import PAGES, ROOT, named_files, text_of

PLACEHOLDERS = {
    "serve MODEL": "serve models/shapes_vlm/checkpoint",
    "DIR_OR_HUB_ID": "models/shapes_vlm/checkpoint",
    "CHECKPOINT": "models/shapes_vlm/checkpoint",
    "host:port,host:port": "127.0.0.1:50061,127.0.0.1:50062",
    "--seed S": "--seed 0",
    "[SECONDS]": "2",
}
"""What stands for something, and what."""

SCENE = ROOT / "models/shapes_vlm/samples/scene_1.png"


def filled_in(text: str) -> str:
    """A command with values for what it leaves to its reader."""
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    return text


def lay_out(folder: Path) -> None:
    """Puts what commands and programs of the documents name into a folder of their own, where they may write."""
    for name in ("a.png", "photo.jpg", "street.jpg"):
        shutil.copy(SCENE, folder / name)
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "docs").mkdir()
    schema = {"type": "object", "properties": {"code": {"type": "string"}}}
    (folder / "schema.json").write_text(json.dumps(schema))
    for page in PAGES:
        for name, text in named_files(text_of(page)).items():
            (folder / name).write_text(text)
