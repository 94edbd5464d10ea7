"""Chat templates of every form: whatever a user wrote reaches the model, or the request is refused."""

from __future__ import annotations

import pytest
from jinja2 import Environment
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.preprocess.conversation import render
from shared.errors import InvalidRequestError
from tests.unit.prefill_worker.prompts import message, user

PARTS = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %};{% endfor %}"
STRINGS = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
PRINTED = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ ';' }}{% endfor %}"
FIRST_OF_SYSTEM = (
    "{% if messages[0].role == 'system' %}system:{{ messages[0].content[0].text }};{% set messages = messages[1:] %}"
    "{% endif %}" + PARTS
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + PARTS
ALTERNATING = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + PARTS
)
CHAT = [message("system", "Be brief."), user("Hello."), message("assistant", "Hi."), user("And now?")]
RENDERED = "system:Be brief.;user:Hello.;assistant:Hi.;user:And now?;"


class Templated:
    """A processor of nothing but a template."""

    def __init__(self, template: str) -> None:
        environment = Environment(autoescape=False)
        environment.globals["raise_exception"] = self._raise
        self._template = environment.from_string(template)

    def apply_chat_template(self, chat: object, *, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        return self._template.render(messages=chat)

    @staticmethod
    def _raise(reason: str) -> None:
        raise TypeError(reason)


@pytest.mark.parametrize("template", [PARTS, STRINGS, PRINTED, FIRST_OF_SYSTEM])
def test_a_template_gets_the_form_that_it_expects(template: str) -> None:
    assert render(Templated(template), CHAT) == RENDERED


def test_all_parts_of_a_system_message_are_read() -> None:
    chat = [message("system", "Be brief. ", "Be exact."), user("Hello.")]
    assert render(Templated(FIRST_OF_SYSTEM), chat) == "system:Be brief. Be exact.;user:Hello.;"


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        (NO_SYSTEM, CHAT, "leaves out text of the system"),
        (ALTERNATING, CHAT, "roles must alternate"),
        (PRINTED, [user("Look:", b"png")], "as they are"),
        (STRINGS, [user("Look:", b"png")], "concatenate"),
    ],
)
def test_what_a_template_cannot_say_is_refused(template: str, chat: list[pb.Message], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        render(Templated(template), chat)
    assert refused.value.reason == "CHAT_TEMPLATE"


def test_the_same_text_twice_must_be_there_twice() -> None:
    last_two = "{% for m in messages[-2:] %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"
    chat = [user("yes"), message("assistant", "yes"), user("yes")]
    with pytest.raises(InvalidRequestError, match="leaves out text of the user"):
        render(Templated(last_two), chat)
