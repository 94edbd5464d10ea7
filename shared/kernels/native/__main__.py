"""Builds the native kernels where there is a C compiler: $CC or cc."""

from __future__ import annotations

import os
import shlex
import subprocess

from shared.kernels.native.build import build


def main() -> None:
    compiler = os.environ.get("CC") or "cc"
    try:
        print(f"native kernels: {build(shlex.split(compiler)).name}")
    except OSError as error:
        print(f"native kernels: none, the service runs on torch alone: {error}")
    except subprocess.CalledProcessError as error:
        complaint = next((line for line in error.stderr.splitlines() if "error" in line), f"exit {error.returncode}")
        print(f"native kernels: none, the service runs on torch alone: {compiler}: {complaint}")


if __name__ == "__main__":
    main()
