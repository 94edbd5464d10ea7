"""The picture of an answer: which visual tokens were kept, summed and per layer, and each layer's budget."""

from collections.abc import Sequence

from PIL import Image

from vlcache._completion import Completion
from vlcache._events import Compressed, Guard
from vlcache._kept import Kept
from vlcache.explain.budget import budget_height, draw_budget
from vlcache.explain.canvas import INK, QUIET, RULE, Canvas, line_height, wrapped
from vlcache.explain.mosaic import Mosaic
from vlcache.explain.overlay import open_image
from vlcache.explain.shares import layer_budgets
from vlcache.formatting import format_bytes, format_share

WIDTH, MARGIN, GAP = 1200, 40, 40
_ROOM = WIDTH - 2 * MARGIN
_QUESTION, _ANSWER, _NOTE = 24, 18, 14
_LEADING = 3
# Pixels that the chart of the budgets may take where no image stands beside it.
_CHART = 420


def draw(question: str, completion: Completion, images: Sequence[bytes]) -> Image.Image:
    """The picture, RGB, 1200 pixels wide.

    question: what was asked; may be empty.
    completion: the answer to a request that said `explain`.
    images: the encoded files that were asked about, in their order.

    Raises ValueError when the service did not say which tokens were kept, or when those of an image are no grid over
    it; OSError when an image is none.
    """
    compressed, kept = _kept_of(completion)
    mosaic = Mosaic(kept, [open_image(data) for data in images]) if images else None
    lines = _header(question, completion, compressed, kept)
    head = MARGIN + sum(line_height(size) + _LEADING for _, size, _ in lines) + GAP // 2
    summed = mosaic.summed() if mosaic else None
    beside = summed.size if summed else (-GAP, 0)
    middle = max(beside[1], budget_height(len(kept.layers), beside[1] or _CHART))
    layers = mosaic.layers(_ROOM) if mosaic else None
    height = head + middle + MARGIN + (GAP + layers.height if layers else 0)
    canvas = Canvas(WIDTH, height)
    _write(canvas, lines)
    canvas.fill((MARGIN, head - GAP // 2 + 6, WIDTH - MARGIN, head - GAP // 2 + 7), RULE)
    if summed and layers:
        canvas.image.paste(summed, (MARGIN, head))
        canvas.image.paste(layers, (MARGIN, head + middle + GAP))
    chart = (MARGIN + beside[0] + GAP, head)
    draw_budget(
        canvas, chart, (WIDTH - MARGIN - chart[0], middle), layer_budgets(kept), compressed.layer_attention_mass
    )
    return canvas.image


def _kept_of(completion: Completion) -> tuple[Compressed, Kept]:
    compressed = completion.compression
    if compressed is None:
        raise ValueError(
            "the answer ended before its KV was handed over, so nothing was dropped: "
            "ask for a longer answer, or let the policy look less far ahead"
        )
    if compressed.kept is None:
        raise ValueError(
            "the answer does not say which tokens were kept: ask with Compression(explain=True); "
            "a service that then says nothing is older than this client"
        )
    if any(not grid.tokens for grid in compressed.kept.images):
        raise ValueError(
            "the model reads an image as several views that overlap, so its tokens are no grid over the image: "
            "there is no picture of them"
        )
    return compressed, compressed.kept


Line = tuple[str, int, tuple[int, int, int]]
"""Text, size, colour."""


def _header(question: str, completion: Completion, compressed: Compressed, kept: Kept) -> list[Line]:
    return [
        *((line, _QUESTION, INK) for line in wrapped(question, _QUESTION, _ROOM, 2) if line),
        *((line, _ANSWER, QUIET) for line in wrapped(completion.text, _ANSWER, _ROOM, 2)),
        *((line, _NOTE, QUIET) for line in wrapped(_facts(completion, compressed, kept), _NOTE, _ROOM, 2)),
    ]


def _facts(completion: Completion, compressed: Compressed, kept: Kept) -> str:
    usage, transfer, budgets = completion.usage, completion.transfer, layer_budgets(kept)
    visual, text = (sum(tokens) / len(budgets) for tokens in zip(*budgets, strict=True))
    sent = f", {format_bytes(transfer.sent_bytes)} sent via {transfer.transport}" if transfer else ""
    guard = [] if compressed.guard is Guard.OFF else [f"quality guard: {compressed.guard.value}"]
    return " · ".join(
        (
            f"{compressed.policy}: {format_share(compressed.asked_retention, 1)} asked",
            *guard,
            f"{format_share(compressed.realised_retention, 1)} of the KV kept",
            f"{format_share(visual, usage.visual_tokens)} of the visual tokens",
            f"{format_share(text, usage.text_tokens)} of the text",
            f"{format_bytes(compressed.full_bytes)} full{sent}",
            f"prompt {usage.prompt_tokens} tokens ({usage.visual_tokens} visual + {usage.text_tokens} text)",
        )
    )


def _write(canvas: Canvas, lines: Sequence[Line]) -> None:
    y = MARGIN
    for text, size, color in lines:
        canvas.write((MARGIN, y), text, size, color)
        y += line_height(size) + _LEADING
