"""Checkpoints of directories and of the hub's cache; the network is never asked."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from shared.config import WorkerConfig
from shared.model import hub
from shared.model.checkpoint import open_checkpoint
from shared.model.hub import NEEDED_FILES, resolve_checkpoint
from shared.model.progress import LoggedProgress, track
from shared.model.support import UnsupportedModelError
from tests.unit.shared.tiny_llava import copied

COMMITS = ("1" * 40, "2" * 40)


class Cache:
    """A cache folder as huggingface_hub lays it out: blobs, links to them per commit, and names of commits."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder / f"models--{model.replace('/', '--')}"

    def add(self, checkpoint: Path, commit: str, *names: str) -> Path:
        """Puts a checkpoint there under a commit, and under branches or tags."""
        snapshot = self.folder / "snapshots" / commit
        for directory in (snapshot, self.folder / "blobs", self.folder / "refs"):
            directory.mkdir(parents=True, exist_ok=True)
        for file in checkpoint.iterdir():
            blob = self.folder / "blobs" / f"{commit}-{file.name}"
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(blob)
        for name in names:
            (self.folder / "refs" / name).write_text(commit)
        return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    # read from HF_HUB_OFFLINE=1 when huggingface_hub was imported
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Cache(tmp_path, "owner/name")


@pytest.fixture
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))


def test_a_hub_id_is_found_in_the_cache(cache: Cache, tiny_checkpoint: Path) -> None:
    old = cache.add(tiny_checkpoint, COMMITS[0], "v1")
    new = cache.add(tiny_checkpoint, COMMITS[1], "main")
    assert resolve_checkpoint("owner/name") == new
    assert resolve_checkpoint("owner/name", "main") == new
    assert resolve_checkpoint("owner/name", "v1") == old
    assert resolve_checkpoint("owner/name", COMMITS[0]) == old


def test_the_environment_says_where_and_that_it_is_offline(tmp_path: Path, tiny_checkpoint: Path) -> None:
    Cache(tmp_path / "hub", "owner/name").add(tiny_checkpoint, COMMITS[0], "v1")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    found = "from shared.model.hub import resolve_checkpoint; print(resolve_checkpoint('owner/name', 'v1').name)"
    command = [sys.executable, "-c", found]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [COMMITS[0]]


def test_a_checkpoint_of_the_cache_is_opened(cache: Cache, tiny_checkpoint: Path) -> None:
    cache.add(tiny_checkpoint, COMMITS[0], "v1")
    opened = open_checkpoint(WorkerConfig(model="owner/name", revision="v1", served_model_name="tiny", dtype="float32"))
    plain = open_checkpoint(WorkerConfig(model=str(tiny_checkpoint), served_model_name="tiny", dtype="float32"))
    assert opened.spec == plain.spec
    assert opened.identity == plain.identity


@pytest.mark.parametrize("revision", ["", "v2", "3" * 40])
def test_what_is_not_there_is_an_error_that_names_it(cache: Cache, tiny_checkpoint: Path, revision: str) -> None:
    cache.add(tiny_checkpoint, COMMITS[0], "v1")
    with pytest.raises(FileNotFoundError, match=f"'owner/name' at '{revision or 'main'}' is neither here"):
        resolve_checkpoint("owner/name", revision)
    with pytest.raises(FileNotFoundError, match="'owner/other'"):
        resolve_checkpoint("owner/other", revision)


def test_only_needed_files_are_asked_for(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(tiny_checkpoint)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_checkpoint("owner/name", "v1") == tiny_checkpoint
    assert (asked["model"], asked["revision"], asked["allow_patterns"]) == ("owner/name", "v1", list(NEEDED_FILES))
    needed = {file.name for file in tiny_checkpoint.iterdir()}
    assert {name for name in needed if any(Path(name).match(pattern) for pattern in NEEDED_FILES)} == needed
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "modeling_x.py", "model.ckpt", "x.msgpack"):
        assert not any(Path(name).match(pattern) for pattern in NEEDED_FILES)


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize("model", ["/no/such/model", "./no-such", "../no/such", "~/no-such", "a/b/c", "no-such", ""])
def test_a_path_that_does_not_exist_is_not_looked_up_in_the_network(model: str) -> None:
    with pytest.raises(FileNotFoundError):
        resolve_checkpoint(model)


@pytest.mark.usefixtures("nobody_asks")
def test_a_directory_wins_over_a_hub_id(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.parent.mkdir()
    folder.symlink_to(tiny_checkpoint)
    for model in ("owner/name", str(folder), "./owner/name"):
        assert resolve_checkpoint(model).samefile(tiny_checkpoint)


@pytest.mark.usefixtures("nobody_asks")
def test_a_directory_has_no_revisions(tiny_checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match="revision 'v1' belongs to a hub id"):
        resolve_checkpoint(str(tiny_checkpoint), "v1")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", None])
def test_pickled_weights_are_refused_with_the_reason(tiny_checkpoint: Path, tmp_path: Path, name: str | None) -> None:
    folder = copied(tiny_checkpoint, tmp_path)
    if name:
        (folder / "model.safetensors").rename(folder / name)
    else:
        (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"must have weights as safetensors.*a pickle can") as caught:
        resolve_checkpoint(str(folder))
    assert ("its weights are pickled" in str(caught.value)) == (name is not None)


def test_a_worker_that_cannot_serve_its_model_ends_with_a_sentence() -> None:
    command = [sys.executable, "-m", "decode_worker", "--model", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "cannot serve '/no/such/model': there is no checkpoint at '/no/such/model'"
    assert "Traceback" not in done.stderr


def test_progress_that_nobody_watches_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "shared.model.progress"):
        bar = LoggedProgress(total=5, desc="weights")
        assert not caplog.messages
        bar.update(5)
        bar.close()
        assert list(track([1, 2, 3], "steps")) == [1, 2, 3]
    assert [message.split(",")[0] for message in caplog.messages] == ["weights: 5 of 5", "steps: 3 of 3"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    with caplog.at_level(logging.INFO):
        assert list(track([1, 2], "steps")) == [1, 2]
    assert "steps: 100%" in terminal.getvalue()
    assert not caplog.messages
