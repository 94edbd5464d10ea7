"""Compiles the native kernels into one shared library, at installation; a running service never compiles."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
DOORS = ("slab_attention.c", "statistics.c")
FLAGS = ("-O2", "-std=gnu11", "-fPIC", "-Wall", "-Wextra")
# slab_attention.c takes the widest that the processor has; the library runs on every processor of the architecture.
INSTRUCTION_SETS = {"base": (), "avx2": ("-mavx2", "-mfma"), "avx512": ("-mavx512f", "-mfma")}
# statistics_rows.c is for processors with AMX, and compilers that know it: GCC 11, clang 11 and later.
TILES = ("-mavx512f", "-mfma", "-mamx-tile", "-mamx-bf16")


def library_path() -> Path:
    """Where the library of these very sources is, or would be: one that was built from others is never loaded."""
    recipe = hashlib.sha256(platform.machine().encode())
    for source in sorted([*FOLDER.glob("*.[ch]"), Path(__file__)]):
        recipe.update(source.read_bytes())
    return FOLDER / f"vlcache-{recipe.hexdigest()[:16]}.so"


def build(compiler: Sequence[str]) -> Path:
    """Compiles unless it is there; removes what older sources left.

    Args:
        compiler: The C compiler's command.

    Raises:
        OSError: There is no such command, or the folder cannot be written.
        subprocess.CalledProcessError: The compiler refused.
    """
    library = library_path()
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            # the name appears when the content is complete: others may be loading it
            _compile(compiler, Path(folder)).replace(library)
    for stale in set(FOLDER.glob("vlcache-*.so")) - {library}:
        stale.unlink(missing_ok=True)
    return library


def _compile(compiler: Sequence[str], folder: Path) -> Path:
    wide = platform.machine() in ("x86_64", "AMD64")
    objects = []
    for name, options in INSTRUCTION_SETS.items() if wide else [("base", ())]:
        objects.append(str(folder / f"{name}.o"))
        rows = [*options, f"-DWORK=slab_rows_{name}", "-c", "slab_rows.c", "-o", objects[-1]]
        _run([*compiler, *FLAGS, *rows])
    if wide and _knows(compiler, TILES):
        objects.append(str(folder / "tiles.o"))
        _run([*compiler, *FLAGS, *TILES, "-c", "statistics_rows.c", "-o", objects[-1]])
    library = folder / "library.so"
    _run([*compiler, *FLAGS, "-shared", *DOORS, *objects, "-o", str(library)])
    return library


def _knows(compiler: Sequence[str], options: Sequence[str]) -> bool:
    try:
        _run([*compiler, *options, "-E", "vectors.h", "-o", os.devnull])
    except subprocess.CalledProcessError:
        return False
    return True


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
