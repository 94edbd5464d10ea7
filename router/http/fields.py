"""Fields that are not served: those that would change the meaning of a request are refused, others passed over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from router.http.errors import InvalidFieldError
from router.http.schema import ChatRequest

log = logging.getLogger(__name__)

# With the values that ask for nothing; null never does.
_NOTHING: tuple[object, ...] = ([], {}, False, "")
REFUSED: Mapping[str, tuple[object, ...]] = {
    "tools": _NOTHING,
    "tool_choice": ("none", "auto"),
    "functions": _NOTHING,
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": ([], ["text"]),
    "web_search_options": (),
    # vLLM's
    "allowed_token_ids": _NOTHING,
    "add_generation_prompt": (True,),
    "bad_words": _NOTHING,
    "chat_template": (),
    "chat_template_kwargs": _NOTHING,
    "continue_final_message": (False,),
    "documents": _NOTHING,
    "echo": (False,),
    "guided_json_object": (False,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": _NOTHING,
    "length_penalty": (1,),
    "logits_processors": _NOTHING,
    "min_p": (0,),
    "mm_processor_kwargs": _NOTHING,
    "prompt_logprobs": (0,),
    "skip_special_tokens": (True,),
    "stop_token_ids": _NOTHING,
    "structural_tag": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
REFUSED_IN_MESSAGES: Mapping[str, tuple[object, ...]] = {
    "tool_calls": _NOTHING,
    "function_call": (),
    "audio": (),
}
# Names are the clients': what is remembered and logged of them is bounded.
MAX_NAMES = 100
MAX_NAME = 64


class Ignored:
    """Logs each field that is passed over, once per name."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def note(self, names: list[str]) -> None:
        """These fields of a request mean nothing here."""
        for name in names:
            name = name[:MAX_NAME]
            if name not in self._names and len(self._names) < MAX_NAMES:
                self._names.add(name)
                log.warning("requests have a field %a, which is ignored", name)


def check_fields(request: ChatRequest, ignored: Ignored) -> None:
    """Looks at the fields that nothing else looks at.

    Raises:
        InvalidFieldError: One of them would change the answer, and is not served.
    """
    ignored.note(_ignored(request.model_extra, REFUSED, ""))
    for number, message in enumerate(request.messages):
        _ignored(message.model_extra, REFUSED_IN_MESSAGES, f"messages[{number}].")


def _ignored(given: dict[str, Any] | None, refused: Mapping[str, tuple[object, ...]], where: str) -> list[str]:
    """The names that are in no table.

    Raises:
        InvalidFieldError: A name is in the table and asks for something.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    for name in given.keys() & refused.keys():
        if given[name] not in refused[name]:
            raise InvalidFieldError("this is not served", param=f"{where}{name}", reason="UNSUPPORTED_FIELD")
    return sorted(given.keys() - refused.keys())
