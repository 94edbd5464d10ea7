"""Starts the training processes: `python -m models.shapes_vlm.training --out DIR --seed S`.

The command itself only launches one copy of itself per process, with an allocator that gives memory back to
nobody: fresh pages for every activation cost more than the arithmetic on them.
"""

import os
import signal
import subprocess
import sys

import tyro

from models.shapes_vlm.training.config import TrainingConfig
from models.shapes_vlm.training.loop import train

RANK = "SHAPES_VLM_RANK"
ALLOCATOR = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.trim_threshold=17179869184",
        "glibc.malloc.top_pad=268435456",
        "glibc.malloc.mmap_threshold=17179869184",
    )
)


def _launch(config: TrainingConfig) -> int:
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "rendezvous").unlink(missing_ok=True)
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": ALLOCATOR,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception runs the clean-up below
    command = [sys.executable, "-m", "models.shapes_vlm.training", *sys.argv[1:]]
    children = [subprocess.Popen(command, env={**environment, RANK: str(rank)}) for rank in range(config.processes)]
    try:
        return max(child.wait() for child in children)
    finally:
        for child in children:
            child.terminate()


def main() -> None:
    config = tyro.cli(TrainingConfig, description=__doc__)
    if RANK not in os.environ:
        sys.exit(_launch(config))
    train(config, int(os.environ[RANK]))


if __name__ == "__main__":
    main()
