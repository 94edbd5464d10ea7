"""Answers of which everything is known: what was kept is made up, patch by patch."""

import io
from collections.abc import Sequence

from PIL import Image
from vlcache import (
    Completion,
    Compressed,
    FinishReason,
    ImageGrid,
    Kept,
    Placement,
    Timings,
    Transferred,
    Usage,
)

WHOLE = (0.0, 0.0, 1.0, 1.0)
HEADS = 4
ROWS, COLUMNS = 3, 4
TEXT = 2


def grid(first_token: int = TEXT, box: tuple[float, float, float, float] = WHOLE) -> ImageGrid:
    return ImageGrid(first_token=first_token, rows=ROWS, columns=COLUMNS, box=box)


def kept(layers: Sequence[Sequence[int]], *images: ImageGrid) -> Kept:
    return Kept(num_kv_heads=HEADS, layers=tuple(map(tuple, layers)), images=images)


def answer(what: Kept | None, *, text: str = "a red dot", compressed: bool = True) -> Completion:
    """`compressed` is False for an answer that ended before."""
    layers = what.layers if what else ((0,),)
    visual = sum(len(image.tokens) for image in what.images) if what else 0
    compression = Compressed(
        policy="vl_cache",
        asked_retention=0.1,
        requested_retention=0.1,
        realised_retention=0.125,
        full_bytes=2**21,
        kept_bytes=2**18,
        layer_tokens=tuple(max(layer) for layer in layers),
        layer_attention_mass=(0.5,) * len(layers),
        prompt_tokens=len(layers[0]),
        visual_tokens=visual,
        kept=what,
    )
    return Completion(
        request_id="r",
        model="m",
        text=text,
        token_ids=(5, 6),
        finish_reason=FinishReason.STOP,
        usage=Usage(prompt_tokens=len(layers[0]), visual_tokens=visual, generated_tokens=2),
        compression=compression if compressed else None,
        transfer=Transferred(transport="memory", sent_bytes=300_000, seconds=0.1) if compressed else None,
        timings=Timings(ttft_s=0.1, ttst_s=0.2, itl_s=(0.1,), e2e_s=0.2),
        seed=1,
        placement=Placement(prefill_worker="p", decode_worker="d"),
    )


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def red(width: int = 120, height: int = 90) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 0, 0))
