"""The shape of the code: small files, empty packages, nothing that runs what it was sent."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.sources import APPLICATION, SERVICES, name_of, python_files, tree

MAX_LINES = 400
# Modules that turn bytes into code.
LOADERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "torch.save", "torch.hub.load", "os.system", "os.popen", "pandas.read_pickle", "yaml.load"}
# A parameter that makes a harmless call harmful.
ARGUMENTS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def test_the_services_are_found() -> None:
    assert len(python_files(*SERVICES)) > 50
    assert not [file for file in python_files(*SERVICES) if "tests" in file.parts]


@pytest.mark.parametrize("file", python_files(*SERVICES), ids=name_of)
def test_no_file_is_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


PACKAGES = [file for file in python_files(*APPLICATION) if file.name == "__init__.py"]


@pytest.mark.parametrize("file", PACKAGES, ids=name_of)
def test_a_package_imports_nothing(file: Path) -> None:
    """Importing one module must not import its neighbours: the router would end up with torch."""
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree(file).body)


def harmful(root: ast.AST) -> Iterator[str]:
    for node in ast.walk(root):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in LOADERS)
            case ast.ImportFrom(module=str(module), names=names):
                yield from ([module] if module.split(".")[0] in LOADERS else [])
                yield from (full for name in names if (full := f"{module}.{name.name}") in CALLS)
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield name
            case ast.Call(func=ast.Attribute()) if ast.unparse(node.func) in CALLS:
                yield ast.unparse(node.func)
            case ast.keyword(arg=str(name), value=ast.Constant(value=value)) if ARGUMENTS.get(name, ...) is value:
                yield f"{name}={value}"


@pytest.mark.parametrize("file", python_files("client/src", *APPLICATION), ids=name_of)
def test_nothing_is_executed_or_unpickled(file: Path) -> None:
    assert list(harmful(tree(file))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("import torch, pickle as p", ["pickle"]),
        ("from cloudpickle import loads", ["cloudpickle"]),
        ("def f():\n    import _pickle", ["_pickle"]),
        ("torch.load('x')", ["torch.load"]),
        ("from torch import load", ["torch.load"]),
        ("eval('1')", ["eval"]),
        ("subprocess.run('ls', shell=True)", ["shell=True"]),
        ("np.load(f, allow_pickle=True)", ["allow_pickle=True"]),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", ["trust_remote_code=True"]),
        ("model.eval(); subprocess.run(['ls'], shell=False); re.compile('x'); load(f, key=None)", []),
    ],
)
def test_the_search_finds_what_it_is_for(source: str, found: list[str]) -> None:
    assert list(harmful(ast.parse(source))) == found
