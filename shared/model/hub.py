"""Finds a checkpoint: a directory, or what a Hugging Face hub id names, downloaded or in the hub's cache.

Only data is taken. Pickled weights and Python files, either of which could run code here, are never downloaded.
"""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from shared.model.progress import progress_class
from shared.model.support import UnsupportedModelError

log = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"
# Configurations, processors, chat templates, and all kinds of tokenizers.
NEEDED_FILES = (WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_checkpoint(model: str, revision: str = "") -> Path:
    """The local directory of a checkpoint. With HF_HUB_OFFLINE=1 the network is never asked.

    Args:
        revision: Branch, tag or commit of a hub id; its main branch when empty.

    Raises:
        FileNotFoundError: There is no such checkpoint, or a directory should have had revisions.
        UnsupportedModelError: Its weights are not safetensors.
    """
    path = Path(model)
    local = bool(model) and path.is_dir()
    if not local and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise FileNotFoundError(f"there is no checkpoint at {model!r}")
    if local and revision:
        raise FileNotFoundError(f"revision {revision!r} belongs to a hub id, and {model!r} is a directory")
    folder = path if local else _snapshot(model, revision)
    _check_weights(model, folder)
    return folder


def _snapshot(model: str, revision: str) -> Path:
    log.info("looking for %s at %s", model, revision or "its main branch")
    try:
        folder = snapshot_download(
            model,
            revision=revision or None,
            allow_patterns=list(NEEDED_FILES),
            tqdm_class=progress_class(),
            # some versions ask the network for the files of a commit all the same
            local_files_only=is_offline_mode(),
        )
    except (LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        named = f"{model!r} at {revision or 'main'!r}"
        raise FileNotFoundError(f"{named} is neither here nor on the hub: {error}") from error
    return Path(folder)


def _check_weights(model: str, folder: Path) -> None:
    if any(folder.glob(WEIGHTS)):
        return
    pickled = any(file for pattern in PICKLED for file in folder.glob(pattern))
    found = "its weights are pickled" if pickled else "it has none, or only pickled ones on the hub"
    raise UnsupportedModelError(
        f"{model!r} must have weights as safetensors: {found}, and a pickle can run code when it is read. "
        "Save the model again with transformers' save_pretrained, which writes safetensors"
    )
