"""`python -m deploy.local.child PARENT MODULE ARGS...`: runs a module that dies with its parent, however that dies."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent, then becomes `python -m MODULE ARGS...`."""
    parent, module, *flags = sys.argv[1:]
    die_with(int(parent))
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def die_with(parent: int) -> None:
    """Asks the kernel for SIGKILL at the end of `parent`; ends at once when that has happened already.

    Raises:
        OSError: This kernel cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit("the launcher has ended")


if __name__ == "__main__":
    main()
