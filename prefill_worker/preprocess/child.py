"""`python -m prefill_worker.preprocess.child PARENT MEMORY_BYTES ARGS...`: a preprocessing process within its bounds.

It dies with its parent, however that dies, and has so much memory for data and no more.
"""

from __future__ import annotations

import resource
import runpy
import sys

from shared.parent import die_with

MODULE = "prefill_worker.preprocess.process"


def main() -> None:
    """Sets the bounds, then becomes `python -m prefill_worker.preprocess.process ARGS...`."""
    parent, memory_bytes, *flags = sys.argv[1:]
    die_with(int(parent))
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes),) * 2)
    # a crash must not write strangers' images to disk
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # transformers takes it for not installed: a sixth of the memory and a third of the start
    sys.modules["torch"] = None  # type: ignore[assignment]  # what Python's own documentation says to put there
    sys.argv = [MODULE, *flags]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
