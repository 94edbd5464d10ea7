"""`python -m deploy.local.child PARENT MODULE ARGS...`: runs a module that dies with its parent, however that dies."""

from __future__ import annotations

import runpy
import sys

from shared.parent import die_with


def main() -> None:
    """Ties this process to its parent, then becomes `python -m MODULE ARGS...`."""
    parent, module, *flags = sys.argv[1:]
    die_with(int(parent))
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
