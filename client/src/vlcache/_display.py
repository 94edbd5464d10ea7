"""An answer as a notebook shows it: its text, how much of the KV was kept, what it took. All text is escaped."""

import html
import re
from collections.abc import Sequence

_BAR_CELLS = 20
# What Markdown takes for more than text; the escapes of HTML come before.
_MARKED = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$:])")
# Readable on white and on black: text has the page's colours.
_FRAME = "border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:.7em 1em;max-width:56em;margin:.3em 0"
_FACTS = "opacity:.75;font-size:.85em;margin-top:.5em"
_TRACK = "background:rgba(128,128,128,.3);border-radius:3px;height:.5em;margin-top:.7em;overflow:hidden"
_FILL = "background:#2563eb;height:100%"


def to_html(answers: Sequence[str], facts: Sequence[str], kept_share: float | None) -> str:
    """A card.

    answers: the texts, one for each choice.
    facts: lines below them.
    kept_share: of the prompt's KV, in [0, 1]; no bar when None.
    """
    texts = "".join(f'<div style="white-space:pre-wrap">{html.escape(text)}</div>' for text in _numbered(answers))
    lines = "<br>".join(map(html.escape, facts))
    return f'<div style="{_FRAME}">{texts}{_html_bar(kept_share)}<div style="{_FACTS}">{lines}</div></div>'


def _html_bar(share: float | None) -> str:
    if share is None:
        return ""
    percent = f"{100 * share:.1f}"
    title = f"{percent} % of the KV kept"
    return f'<div style="{_TRACK}" title="{title}"><div style="{_FILL};width:{percent}%"></div></div>'


def to_markdown(answers: Sequence[str], facts: Sequence[str], kept_share: float | None) -> str:
    """The same in Markdown: answers as quotations, the bar in characters."""
    quoted = "\n\n".join(_quotation(text) for text in _numbered(answers))
    bar = [] if kept_share is None else [f"`{text_bar(kept_share)}` {100 * kept_share:.1f} % of the KV kept"]
    return "\n\n".join([quoted, *bar, *map(_escaped, facts)])


def text_bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A share in [0, 1] as characters; what is there has one."""
    filled = min(cells, max(round(cells * share), 1 if share > 0 else 0))
    return "█" * filled + "░" * (cells - filled)


def _numbered(answers: Sequence[str]) -> list[str]:
    """One answer stands by itself."""
    if len(answers) == 1:
        return list(answers)
    return [f"{number}. {text}" for number, text in enumerate(answers, start=1)]


def _quotation(text: str) -> str:
    return "\n".join(f"> {_escaped(line)}  " for line in text.splitlines() or [""])


def _escaped(text: str) -> str:
    return _MARKED.sub(r"\\\1", html.escape(text, quote=False))
