"""Which reasons the code gives with which status code: what the table of docs/protocol.md has to say."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping

from router.http.errors import InvalidFieldError
from router.stages import PREFILL, TRANSFER
from shared import errors
from tests.documents.pages import ROOT

FOLDERS = ("router", "shared", "prefill_worker", "decode_worker")
ERRORS = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type)} | {
    "InvalidFieldError": InvalidFieldError
}
REMOTE_IMAGES = ROOT / "router/http/remote_images.py"
# Where the reason is put together, or handed through, in the file of that name.
MADE = {
    "router/requests/prefill_call.py": {f"{stage.upper()}_TIMEOUT" for stage in (PREFILL, TRANSFER)},
    "router/http/remote_images.py": set(re.findall(r'"(URL(?:_[A-Z]+)?)"\)', REMOTE_IMAGES.read_text())),
}


@functools.cache
def reasons() -> dict[str, set[str]]:
    """By status code the reasons of all errors that the services raise, those that a class has by default included."""
    trees = {file: ast.parse(file.read_text()) for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))}
    constants = {name: value for tree in trees.values() for name, value in _constants(tree)}
    found: dict[str, set[str]] = {}
    for file, tree in trees.items():
        for cls, reason in _raised(str(file.relative_to(ROOT)), tree, constants):
            found.setdefault(cls.code, set()).add(reason)
    return found


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((target.id, node.value.value) for target in node.targets if isinstance(target, ast.Name))


def _raised(
    file: str, tree: ast.Module, constants: Mapping[str, str]
) -> Iterator[tuple[type[errors.ServiceError], str]]:
    for node in ast.walk(tree):
        name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
        cls = ERRORS.get(name)
        if cls is None or not issubclass(cls, errors.ServiceError):
            continue
        given = next((word.value for word in node.keywords if word.arg == "reason"), ast.Constant(cls.default_reason))
        if isinstance(given, ast.Constant):
            yield cls, str(given.value)
        elif isinstance(given, ast.Name) and given.id in constants:
            yield cls, constants[given.id]
        else:
            yield from ((cls, reason) for reason in MADE.get(file, {f"unknown, in {file}:{node.lineno}"}))
