"""What a whole worker keeps of images, behind real gRPC: for the tenant that sent them, and seen in its metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import generate_latest

from prefill_worker.config import PrefillConfig
from prefill_worker.worker import LoadedModel, load_model
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture
from tests.unit.prefill_worker.served import Stack, run

PICTURE = encoded(picture(1))


def figure(stack: Stack, name: str) -> float:
    exported = generate_latest(stack.worker.metrics.registry).decode()
    (line,) = (line for line in exported.splitlines() if line.startswith(f"vlcache_{name}{{"))
    return float(line.split()[-1])


def hits_and_misses(stack: Stack, cache: str) -> tuple[float, float]:
    return figure(stack, f"{cache}_cache_hits_total"), figure(stack, f"{cache}_cache_misses_total")


@pytest.fixture
def keeping(checkpoint: Path) -> LoadedModel:
    """Not shared among tests: it remembers."""
    return load_model(PrefillConfig(model=str(checkpoint), dtype="float32", prefix_cache_mib=4))


def test_each_tenant_is_spared_its_own_images_alone(keeping: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        for tenant, question in (("a", QUESTION), ("a", "Is there a red one? Say yes or no."), ("b", QUESTION)):
            await stack.prefill(stack.request(PICTURE, question, tenant=tenant))
        assert hits_and_misses(stack, "vision") == (1, 2)
        assert hits_and_misses(stack, "prefix") == (1, 2)
        assert figure(stack, "vision_cache_bytes") == keeping.engine.features.used_bytes > 0
        assert figure(stack, "prefix_cache_bytes") == keeping.engine.prefixes.used_bytes > 0
        await stack.prefill(stack.request("No picture.", tenant="a"))
        assert hits_and_misses(stack, "prefix") == (1, 2)

    run(keeping, body)


def test_by_default_features_are_kept_and_prefixes_are_not(checkpoint: Path) -> None:
    loaded = load_model(PrefillConfig(model=str(checkpoint), dtype="float32"))

    async def body(stack: Stack) -> None:
        for _ in range(2):
            await stack.prefill(stack.request(PICTURE, QUESTION))
        assert hits_and_misses(stack, "vision") == (1, 1)
        assert hits_and_misses(stack, "prefix") == (0, 2)

    run(loaded, body)


@pytest.mark.parametrize(
    "wrong",
    [
        {"vision_cache_mib": -1},
        {"prefix_cache_mib": -1},
        {"prefill_chunk": -1},
        {"prefill_chunk": 1},
        {"preprocess_processes": 0},
        {"preprocess_timeout_s": 0},
        {"preprocess_memory_mib": 0},
        {"preprocess_queue_mib": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PrefillConfig(model="m", **wrong)  # type: ignore[arg-type]
