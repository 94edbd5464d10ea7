"""What a request may ask for beside its answer: which tokens were kept, through real processes, to the picture."""

from __future__ import annotations

from pathlib import Path

import vlcache
from PIL import Image
from vlcache.cli import main

from models.shapes_vlm.questions import Sample, draw_samples
from tests.integration.running_stack import RunningStack

SAMPLE = next(iter(draw_samples(seed=990_033, count=1)))
GRID = 24


def ask(stack: RunningStack, sample: Sample, **compression: object) -> vlcache.Completion:
    with stack.client() as client:
        return client.generate(
            sample.question,
            images=sample.images,
            sampling=vlcache.Sampling(max_new_tokens=6, ignore_eos=True),
            compression=vlcache.Compression(policy="vl_cache", **compression),
        )


def test_kept_tokens_are_told_and_change_nothing_else(stack: RunningStack) -> None:
    plain, told = (ask(stack, SAMPLE, explain=explain) for explain in (False, True))
    assert plain.compression is not None
    assert told.compression is not None
    assert plain.compression.kept is None
    assert told.token_ids == plain.token_ids
    kept, images = told.compression.kept, len(SAMPLE.images)
    assert kept is not None
    # heads choose for themselves, but as many tokens each
    layer_tokens = (sum(layer) / kept.num_kv_heads for layer in kept.layers)
    assert tuple(layer_tokens) == told.compression.layer_tokens
    assert [(grid.rows, grid.columns, grid.box) for grid in kept.images] == [(GRID, GRID, (0, 0, 1, 1))] * images
    assert told.usage.visual_tokens == sum(len(grid.tokens) for grid in kept.images)
    stack.wait_idle()


def test_the_section_costs_a_bit_a_token(grpc_stack: RunningStack) -> None:
    plain, told = (ask(grpc_stack, SAMPLE, explain=explain) for explain in (False, True))
    assert told.compression is not None
    assert told.transfer is not None
    assert plain.transfer is not None
    more = told.transfer.sent_bytes - plain.transfer.sent_bytes
    assert 0 < more < 0.0015 * told.compression.full_bytes


def test_the_command_draws_through_the_service(memory_stack: RunningStack, tmp_path: Path) -> None:
    images = []
    for number, image in enumerate(SAMPLE.images):
        image.save(tmp_path / f"{number}.png")
        images += ["--image", str(tmp_path / f"{number}.png")]
    out = tmp_path / "out.png"
    command = ["explain", "--address", memory_stack.address, *images, SAMPLE.question, "-o", str(out)]
    assert main([*command, "--policy", "look_ahead", "--param", "tokens=2", "--max-new-tokens", "9"]) == 0
    with Image.open(out) as picture:
        assert picture.width == 1200
    memory_stack.wait_idle()
