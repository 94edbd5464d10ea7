"""The budget of each layer as a bar: visual and text tokens that it keeps, and the attention that they get."""

from collections.abc import Sequence

from vlcache.explain.canvas import INK, QUIET, TEXT, VISUAL, Canvas, line_height, text_width
from vlcache.explain.shares import LayerBudget

MIN_ROW, MAX_ROW = 15, 56
_HEAD = 54
_NUMBER, _TOKENS, _ATTENTION = 40, 54, 104


def budget_height(num_layers: int, room: int) -> int:
    """Pixels that the chart takes where `room` is there; more when the layers need it."""
    return _HEAD + num_layers * _row(num_layers, room)


def draw_budget(
    canvas: Canvas,
    at: tuple[int, int],
    size: tuple[int, int],
    budgets: Sequence[LayerBudget],
    attention: Sequence[float],
) -> None:
    """One row per layer.

    at, size: left and top; width and the height that the chart may fill, see `budget_height`.
    attention: per layer, the share of the post-vision attention on kept tokens.
    """
    left, top = at
    bars, width = left + _NUMBER, size[0] - _NUMBER - _TOKENS - _ATTENTION
    most, row = max(budget.tokens for budget in budgets), _row(len(budgets), size[1])
    _head(canvas, at, bars + width)
    letters = min(14, row - 3)
    for layer, (budget, mass) in enumerate(zip(budgets, attention, strict=True)):
        y = top + _HEAD + layer * row
        middle, edge = y + row / 2, bars + width * budget.visual / most
        gap = max(1, round(row * 0.22))
        canvas.write((left, middle), str(layer), letters, QUIET, "lm")
        canvas.fill((bars, y + gap, edge, y + row - gap), VISUAL)
        canvas.fill((edge, y + gap, bars + width * budget.tokens / most, y + row - gap), TEXT)
        canvas.write((bars + width + _TOKENS, middle), f"{budget.tokens:.0f}", letters, INK, "rm")
        canvas.write((left + size[0], middle), f"{100 * mass:.0f} %", letters, QUIET, "rm")


def _head(canvas: Canvas, at: tuple[int, int], end: int) -> None:
    (left, top), small = at, 13
    y = top + line_height(small) + 6
    canvas.write((left, top), "Kept in each layer (mean of its KV heads)", 15)
    x = left + _NUMBER
    canvas.write((left, y), "layer", small, QUIET)
    for name, color in (("visual tokens", VISUAL), ("text tokens", TEXT)):
        canvas.fill((x, y + 2, x + 11, y + 13), color)
        canvas.write((x + 16, y), name, small, QUIET)
        x += 32 + round(text_width(name, small))
    canvas.write((end + _TOKENS, y), "tokens", small, QUIET, "ra")
    canvas.write((end + _TOKENS + _ATTENTION, y), "attention kept", small, QUIET, "ra")


def _row(num_layers: int, room: int) -> int:
    return max(MIN_ROW, min(MAX_ROW, (room - _HEAD) // num_layers))
