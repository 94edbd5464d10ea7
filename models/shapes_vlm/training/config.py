"""What can be set from the command line."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run; the same settings and seed give the same data in the same order."""

    out: Path
    """Folder for the state that training resumes from, the log, and the exported checkpoint."""
    seed: int = 0
    """Seed of the weights and of all scenes and questions."""
    steps: int = 4100
    """Optimiser steps in total, all stages together."""
    dense_steps: int = 700
    """The first steps train the vision tower and the projector alone."""
    full_from: float = 0.65
    """Share of the steps after which batches with all 576 patches begin to grow in number."""
    learning_rate: float = 1.2e-3
    """Peak; one linear warm-up, one cosine decay."""
    rows: int = 6
    """Image sets per step and process."""
    processes: int = 2
    """Single-threaded data-parallel processes, at best one per core."""
    save_every: int = 200
    """Steps between two saved states."""
    stop_after: int | None = None
    """Stop (resumable) at this step, without changing the schedule."""

    def __post_init__(self) -> None:
        if not 0 <= self.dense_steps < self.steps:
            raise ValueError(f"dense_steps must lie in [0, steps), got {self.dense_steps} of {self.steps}")
        if min(self.rows, self.processes, self.save_every) < 1:
            raise ValueError("rows, processes and save_every must be at least 1")
        if not 0 < self.full_from <= 1:
            raise ValueError(f"full_from must lie in (0, 1], got {self.full_from}")
