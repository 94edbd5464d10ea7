"""Running figures of a training run, and the line that shows them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from models.shapes_vlm.training.batches import Conversation

SMOOTHING = 0.97


@dataclass(kw_only=True)
class Progress:
    """Smoothed loss and accuracies; the ETA comes from this run's own pace."""

    total_steps: int
    first_step: int
    started_s: float = field(default_factory=time.monotonic)
    _averages: dict[str, float] = field(default_factory=dict)

    def observe(self, name: str, value: float) -> None:
        before = self._averages.get(name, value)
        self._averages[name] = SMOOTHING * before + (1 - SMOOTHING) * value

    def line(self, step: int, learning_rate: float) -> str:
        done = step + 1 - self.first_step
        pace_s = (time.monotonic() - self.started_s) / max(done, 1)
        eta_min = pace_s * (self.total_steps - step - 1) / 60
        figures = " ".join(f"{name} {value:.3g}" for name, value in sorted(self._averages.items()))
        head = f"step {step + 1}/{self.total_steps} {pace_s:.2f} s/step ETA {eta_min:.0f} min lr {learning_rate:.1e}"
        return f"{head} | {figures}"


def right_answers(
    logits: Tensor, targets: Tensor, index: Tensor, rows: Sequence[Sequence[Conversation]]
) -> list[tuple[str, bool]]:
    """(task, whether every token of the answers is the most likely one) per conversation.

    logits [n, vocabulary], targets [n], index [n, 3] (row, question, token) of one group.
    """
    wrong = index[logits.argmax(-1) != targets][:, :2]
    mistaken = {(int(row), int(question)) for row, question in wrong}
    return [(task_name(q), (b, i) not in mistaken) for b, row in enumerate(rows) for i, q in enumerate(row)]


def task_name(conversation: Conversation) -> str:
    return conversation[0].task if len(conversation) == 1 else "turns"
