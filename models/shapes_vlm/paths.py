"""Where the bundled files lie."""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
SAMPLES: Path = Path(__file__).parent / "samples"
