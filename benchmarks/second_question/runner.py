"""Asks the pairs, decodes all ways of the second question in one batch, and takes the times of the passes."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.local_decoding import Track
from benchmarks.local_pipeline import LocalPipeline
from benchmarks.second_question.config import SecondQuestionConfig
from benchmarks.second_question.cost import Cost, cost_of
from benchmarks.second_question.outcome import Agreement, Outcome
from benchmarks.second_question.pair import PairInPasses, Way
from benchmarks.second_question.text_pass import load_engine
from models.shapes_vlm.pairs import Pair, draw_pairs
from models.shapes_vlm.questions import Sample
from prefill_worker.config import PrefillConfig


class SecondQuestionRunner:
    """Owner of the pipeline for one configuration.

    Attributes:
        costs: One per pair that was asked.
        agreements: One per pair and setting whose parcels are all made.
    """

    def __init__(self, config: SecondQuestionConfig) -> None:
        self._config = config
        self._pipeline = LocalPipeline(
            config.model,
            dtype=config.dtype,
            threads=config.threads,
            kv_memory_mib=config.kv_memory_mib,
            max_num_seqs=config.batch,
        )
        self._engine = load_engine(PrefillConfig(model=config.model, dtype=config.dtype, threads=config.threads))
        self._pairs = draw_pairs(seed=config.seed, count=config.pairs, tasks=config.tasks)
        self._of_track: dict[Track, tuple[Pair, Way]] = {}
        self.costs: list[Cost] = []
        self.agreements: list[Agreement] = []

    def outcomes(self) -> Iterator[Outcome]:
        """Every second question, every way, as they become known."""
        remaining = self._all_ways()
        while True:
            yield from self._fill(remaining)
            if self._pipeline.decoding.idle:
                return
            for track in self._pipeline.decoding.step():
                yield self._outcome(track, *self._of_track.pop(track))

    def _fill(self, remaining: Iterator[tuple[Pair, Way]]) -> Iterator[Outcome]:
        """Fills the batch; a parcel is made when there is a place for it."""
        while self._pipeline.decoding.num_places and (begun := next(remaining, None)) is not None:
            track = begun[1].parcel.track()
            if track.ended:
                yield self._outcome(track, *begun)
            else:
                self._of_track[track] = begun
                self._pipeline.decoding.add(track)

    def _all_ways(self) -> Iterator[tuple[Pair, Way]]:
        for pair in self._pairs:
            passes = PairInPasses(pipeline=self._pipeline, engine=self._engine, config=self._config, pair=pair)
            self.costs.append(cost_of(self._engine, passes.second, passes.prefix))
            yield from ((pair, way) for way in passes.ways())
            self.agreements += passes.agreements

    def _outcome(self, track: Track, pair: Pair, way: Way) -> Outcome:
        first, second = pair
        return Outcome(
            way=way.name,
            setting=way.setting,
            task=second.task,
            apart=_apart(first, second),
            right=self._pipeline.text(track.drawn).strip() == second.answer.strip(),
            compression=way.parcel.compression,
        )


def _apart(first: Sample, second: Sample) -> bool:
    patches = zip(first.answer_patches, second.answer_patches, strict=True)
    return not any(set(one) & set(other) for one, other in patches)
