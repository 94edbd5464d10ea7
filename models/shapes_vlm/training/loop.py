"""The training loop of one process."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from models.shapes_vlm.architecture import build_config, build_model
from models.shapes_vlm.processor import build_processor
from models.shapes_vlm.scenes import Scene, draw_full_scene
from models.shapes_vlm.training.batches import Conversation, Encoder, PrefixBatch
from models.shapes_vlm.training.config import TrainingConfig
from models.shapes_vlm.training.curriculum import KEPT_PATCHES, Step, difficulty, draw_step
from models.shapes_vlm.training.dense import (
    CONTEXT_TARGETS,
    PATCH_TARGETS,
    DenseHeads,
    context_labels,
    kept_labels,
    patch_labels,
    with_some_background,
)
from models.shapes_vlm.training.forward import TextPass, visual_features
from models.shapes_vlm.training.pointwise import fused
from models.shapes_vlm.training.progress import Progress, right_answers
from models.shapes_vlm.training.state import export, load_state, save_state
from models.shapes_vlm.training.weights import MasterWeights

DENSE_RATE = 1.5e-3
WARM_UP_STEPS = 100
FINAL_SHARE = 0.02
"""The decay ends at this share of the peak."""
DENSE_WEIGHT = 0.3
DENSE_UNTIL = 0.85
"""Share of the question stage over which the weight of the dense loss falls to 0."""
LOG_EVERY = 20
_TRAINING_STREAM = 0x5EED
"""Keeps the training data apart from `draw_samples`, whatever the seeds."""


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Dense stage: warm-up, then constant. Question stage: one warm-up, one cosine decay."""
    if step < config.dense_steps:
        return DENSE_RATE * min(1.0, (step + 1) / WARM_UP_STEPS)
    warm = min(1.0, (step - config.dense_steps + 1) / WARM_UP_STEPS)
    decay = 0.5 * (1 + math.cos(math.pi * question_progress(config, step)))
    return config.learning_rate * warm * (FINAL_SHARE + (1 - FINAL_SHARE) * decay)


def question_progress(config: TrainingConfig, step: int) -> float:
    return max(0.0, (step - config.dense_steps) / (config.steps - config.dense_steps))


class Trainer:
    """One of `config.processes` equal trainers; `rank` 0 also logs, saves and exports."""

    def __init__(self, config: TrainingConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self._processor = build_processor()
        architecture = build_config(self._processor.tokenizer)
        self._model = build_model(architecture, seed=config.seed)
        width = architecture.text_config.hidden_size
        self._patch_heads = DenseHeads(width, PATCH_TARGETS)
        self._context_heads = DenseHeads(width, CONTEXT_TARGETS)
        trained = nn.ModuleDict({"model": self._model, "patch": self._patch_heads, "context": self._context_heads})
        self._weights = MasterWeights(dict(trained.named_parameters()))
        self._encoder = Encoder(self._processor.tokenizer, architecture.image_token_id)
        self._pointwise = fused()
        self._first_step = load_state(config.out, self._weights)
        self._progress = Progress(total_steps=config.steps, first_step=self._first_step)

    def run(self) -> None:
        last = min(self._config.steps, self._config.stop_after or self._config.steps)
        for step in range(self._first_step, last):
            rate = learning_rate(self._config, step)
            loss = self._dense_loss(step) if step < self._config.dense_steps else self._question_loss(step)
            loss.backward()
            self._progress.observe("norm", self._weights.step(rate))
            self._progress.observe("loss", loss.item())
            self._report(step, rate, last)

    def _report(self, step: int, rate: float, last: int) -> None:
        if self._rank != 0:
            return
        if (step + 1) % LOG_EVERY == 0:
            print(self._progress.line(step, rate), flush=True)
        if (step + 1) % self._config.save_every == 0 or step + 1 == last:
            save_state(self._config.out, step + 1, self._weights)
            export(self._model, self._processor, self._config.out / "checkpoint")

    def _rngs(self, step: int) -> tuple[np.random.Generator, np.random.Generator]:
        """This process' own generator, and one that is equal in all of them; both depend on the step alone."""
        torch.manual_seed(step * self._config.processes + self._rank)
        seed = [self._config.seed, _TRAINING_STREAM, step]
        return np.random.default_rng([*seed, 1 + self._rank]), np.random.default_rng([*seed, 0])

    def _dense_loss(self, step: int) -> Tensor:
        rng, _ = self._rngs(step)
        rows = [[draw_full_scene(rng)] for _ in range(3 * self._config.rows)]
        prefix = self._encoder.prefix(rng, rows, KEPT_PATCHES)
        features = visual_features(self._model, prefix.patches, prefix.kept, self._pointwise)
        return self._patch_loss(features, rows, prefix)

    def _patch_loss(self, features: Tensor, rows: Sequence[Sequence[Scene]], prefix: PrefixBatch) -> Tensor:
        labels = kept_labels([patch_labels(scene) for row in rows for scene in row], prefix.kept)
        chosen = with_some_background(labels[:, :, 0] > 0)
        return self._observed(*self._patch_heads.loss(features, labels, chosen))

    def _context_loss(self, context: Tensor, rows: Sequence[Sequence[Scene]], prefix: PrefixBatch) -> Tensor:
        labels = kept_labels([context_labels(s, image) for row in rows for image, s in enumerate(row)], prefix.kept)
        return self._observed(*self._context_heads.loss(context, labels, labels[:, :, 1] > 0))

    def _observed(self, loss: Tensor, accuracies: dict[str, float]) -> Tensor:
        for name, value in accuracies.items():
            self._progress.observe(f"~{name}", value)
        return loss

    def _question_loss(self, step: int) -> Tensor:
        rng, shared = self._rngs(step)
        progress = question_progress(self._config, step)
        hard = difficulty(progress, self._config.full_from)
        material = draw_step(rng, shared, hard, self._config.rows)
        prefix = self._encoder.prefix(rng, material.scenes, material.num_kept)
        features = visual_features(self._model, prefix.patches, prefix.kept, self._pointwise)
        loss, context = self._answer_loss(features, prefix, material)
        dense_weight = DENSE_WEIGHT * max(0.0, 1 - progress / DENSE_UNTIL)
        if dense_weight > 0:
            loss = loss + dense_weight * self._patch_loss(features, material.scenes, prefix)
            loss = loss + dense_weight * self._context_loss(context, material.scenes, prefix)
        return loss

    def _answer_loss(self, features: Tensor, prefix: PrefixBatch, material: Step) -> tuple[Tensor, Tensor]:
        rows = [group for group in (material.short, material.long) if group[0]]
        groups = [self._encoder.questions(group, num_images=len(material.scenes[0])) for group in rows]
        output = TextPass(self._model, prefix, groups, self._pointwise).run(features)
        logits, index = output.logits.float(), output.index
        targets = [group.targets[tuple(i.T)] for group, i in zip(groups, index, strict=True)]
        weights = torch.cat([group.weights[tuple(i.T)] for group, i in zip(groups, index, strict=True)])
        self._observe_accuracy(logits.detach(), targets, index, rows, material.num_kept)
        losses = F.cross_entropy(logits, torch.cat(targets), reduction="none")
        return (losses * weights).sum() / weights.sum(), output.context

    def _observe_accuracy(
        self,
        logits: Tensor,
        targets: list[Tensor],
        index: list[Tensor],
        groups: list[list[list[Conversation]]],
        num_kept: int,
    ) -> None:
        parts = logits.split([len(i) for i in index])
        for part, truth, where, questions in zip(parts, targets, index, groups, strict=True):
            for task, right in right_answers(part, truth, where, questions):
                self._progress.observe(task if num_kept == KEPT_PATCHES else f"{task}@full", float(right))


def train(config: TrainingConfig, rank: int) -> None:
    """Runs one process of the training; call it once per rank."""
    torch.set_num_threads(1)
    if config.processes > 1:
        meeting = f"file://{(config.out / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=config.processes)
    Trainer(config, rank).run()
    if dist.is_initialized():
        dist.destroy_process_group()
