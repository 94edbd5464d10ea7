"""The chat format that several families share."""

from __future__ import annotations

START, END = "<|im_start|>", "<|im_end|>"


def chatml(image: str, video: str = "") -> str:
    """A Jinja template of `<|im_start|>role`, content and `<|im_end|>`, with `image` and `video` for every one."""
    image, video = image.replace("\n", "\\n"), video.replace("\n", "\\n")
    return (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' ~ message.role ~ '\\n' -}}"
        "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
        "{%- for part in message.content -%}"
        "{{- {'image': '" + image + "', 'video': '" + video + "'}.get(part.type, part.text) -}}"
        "{%- endfor -%}{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
