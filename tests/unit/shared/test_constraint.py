"""Masks against brute force, endings, and what strangers send."""

from __future__ import annotations

import asyncio
import json
import re
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from models.shapes_vlm.paths import CHECKPOINT
from shared.errors import InvalidRequestError, ResourceExhaustedError
from shared.model import grammars as grammars_module
from shared.model.grammar import Grammar, Tokens
from shared.model.grammar_trial import GrammarTrial
from shared.model.grammars import MAX_KEPT, Grammars
from shared.model.loading import load_tokenizer
from shared.model.sampler import Sampler
from shared.request.constraint import Constraint
from shared.request.sampling import Sampling

PIECES = ["a", "b", "c", "ab", "bc", "abc", "ca", "aa"]
EOS = len(PIECES)
# three logits more than the tokenizer has tokens
VOCABULARY = EOS + 4
LONGEST = 6


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE({piece: token for token, piece in enumerate(PIECES)}, []))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", clean_up_tokenization_spaces=False)


@cache
def tokens() -> LLTokenizer:
    return Tokens.of(tokenizer(), vocabulary=VOCABULARY, eos_token_ids=[EOS]).load()


def compiled(kind: str, text: str) -> Grammar:
    return Grammar.compile(Constraint(kind, text), tokens())  # type: ignore[arg-type]


def sampler(text: str, **more: object) -> Sampler:
    sampling = Sampling(**{"max_new_tokens": 99, "constraint": Constraint("regex", text), **more})  # type: ignore[arg-type]
    return Sampler(sampling, {EOS}, grammar=compiled("regex", text))


@cache
def texts() -> list[str]:
    """Every text up to a length that the alphabet has."""
    found, last = [""], [""]
    for _ in range(LONGEST):
        last = [text + letter for text in last for letter in "abc"]
        found += last
    return found


def brute_force(pattern: str, said: str) -> list[bool]:
    """Token by token: is there a text that goes on so and matches? Right where no sentence of it is too long."""
    sentences = [text for text in texts() if re.fullmatch(pattern, text)]
    may = [any(sentence.startswith(said + piece) for sentence in sentences) for piece in PIECES]
    return [*may, said in sentences, False, False, False]


def is_forced(pattern: str, said: str) -> bool:
    """Whether there is only one letter that can follow, and one must."""
    follow = {
        text[len(said) : len(said) + 1] for text in texts() if text.startswith(said) and re.fullmatch(pattern, text)
    }
    return len(follow) == 1 and follow != {""}


# finite, and every sentence short enough for `texts`
patterns = st.recursive(
    st.sampled_from(["a", "b", "c", "[ab]", "ab", "a?"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"), st.tuples(inner, inner).map("".join)
    ),
    max_leaves=LONGEST // 2,
)


@given(patterns, st.data())
def test_a_mask_is_what_trying_every_text_finds(pattern: str, data: st.DataObject) -> None:
    matcher, said = compiled("regex", pattern).matcher(), ""
    for _ in range(LONGEST + 1):
        allowed = matcher.allowed(VOCABULARY).tolist()
        possible = brute_force(pattern, said)
        # what must come may be spelt in one way alone, the tokenizer's own
        spelt = is_forced(pattern, said) and sum(allowed) == 1 and possible[allowed.index(True)]
        assert spelt or allowed == possible
        token = data.draw(st.sampled_from([token for token, may in enumerate(allowed) if may]))
        matcher.push(token)
        if token == EOS:
            break
        said += PIECES[token]
        assert not matcher.ended or not any(brute_force(pattern, said)[:EOS])
    assert matcher.ended


def test_a_mask_is_as_long_as_the_logits() -> None:
    matcher = compiled("regex", "a|c").matcher()
    assert matcher.allowed(2).tolist() == [True, False]
    assert len(matcher.allowed(1000)) == 1000
    assert not matcher.allowed(1000)[VOCABULARY:].any()


def test_answers_do_not_share_a_matcher() -> None:
    grammar = compiled("regex", "ab|ca")
    first, second = grammar.matcher(), grammar.matcher()
    first.push(0)
    assert first.allowed(EOS).tolist() != second.allowed(EOS).tolist()
    assert second.allowed(EOS).tolist() == grammar.matcher().allowed(EOS).tolist()


def test_nothing_but_what_is_allowed_is_drawn_and_the_rest_is_untouched() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[5] = 50.0
    for temperature in (0.0, 2.0):
        made = sampler("[ab]", temperature=temperature)
        drawn = {made.draw(logits, at).token for at in range(60)}
        assert drawn == ({0} if temperature == 0 else {0, 1})
    assert logits[5] == 50
    assert not made.takes_highest


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([1.0, 2.0, *range(VOCABULARY - 2)])
    drawn = sampler("a", logprobs=1).draw(logits, 0)
    assert drawn.logprobs is not None
    assert drawn.token == 0
    assert drawn.logprobs.logprob == pytest.approx(float(logits.log_softmax(0)[0]))
    assert drawn.logprobs.top[0][0] == VOCABULARY - 1


def test_an_answer_ends_where_nothing_can_follow() -> None:
    made = sampler("ab?")
    made.push(0)
    assert not made.ended
    made.push(1)
    assert made.ended
    made.check()


def test_an_end_that_is_ignored_is_not_drawn_while_something_else_may_be() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[EOS] = 50.0
    ends, goes_on = sampler("a*"), sampler("a*", ignore_eos=True)
    assert ends.draw(logits, 0).token == EOS
    assert goes_on.draw(logits, 0).token == 0


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_new_tokens": 9}])
def test_the_grammar_has_the_last_word(more: dict[str, object]) -> None:
    """Of an answer that must be empty only the end is left, whatever else was asked."""
    made = sampler("a{0}", **more)
    assert made.draw(torch.zeros(VOCABULARY), 0).token == EOS
    made.push(EOS)
    assert made.ended


def test_what_the_grammar_does_not_allow_shows() -> None:
    made = sampler("ab")
    made.push(2)
    with pytest.raises(InvalidRequestError, match="cannot follow its constraint"):
        made.check()
    drawn = made.draw(torch.zeros(VOCABULARY), 1)
    assert drawn.refusal is not None
    assert not made.ended


def test_a_text_that_no_token_can_spell_is_refused_in_words() -> None:
    with pytest.raises(InvalidRequestError, match="can say nothing"):
        compiled("regex", "x")
    matcher = compiled("regex", "ax").matcher()
    matcher.push(0)
    with pytest.raises(InvalidRequestError, match="can say nothing"):
        matcher.allowed(VOCABULARY)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", ""),
        ("regex", "a" * (16 << 10) + "a"),
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", "true"),
        ("json_schema", "[" * 60_000),
        ("json_schema", '{"a": ' + "9" * 60_000 + "}"),
        ("json_schema", " " * (64 << 10) + "{}"),
        ("grammar", "x" * (64 << 10) + "x"),
    ],
)
def test_what_is_no_constraint_is_refused_without_a_model(kind: str, text: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        Constraint(kind, text)  # type: ignore[arg-type]
    assert refused.value.reason == "CONSTRAINT"
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "("),
        ("regex", r"(a)\1"),
        ("regex", "(" * 8000 + "a" + ")" * 8000),
        ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
        ("grammar", "start: start"),
        ("grammar", "start: A\nA: B\nB: A"),
        ("grammar", "%import /etc/passwd\nstart: INT"),
        ("json_schema", '{"a": NaN}'),
        ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}'),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200),
        ("json_schema", json.dumps({"allOf": [{"type": "integer", "multipleOf": each} for each in (991, 983, 977)]})),
        ("json_schema", json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(2200)}})),
    ],
)
def test_what_cannot_be_followed_is_refused_in_words(kind: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{kind} cannot be followed: ") as refused:
        compiled(kind, text)
    assert len(refused.value.message) < 400
    assert refused.value.reason == "CONSTRAINT"


def test_schemas_that_refer_to_themselves_are_followed_where_they_end() -> None:
    known = Tokens.of(load_tokenizer(CHECKPOINT), vocabulary=540, eos_token_ids=[2]).load()
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    Grammar.compile(Constraint("json_schema", json.dumps(tree)), known)
    for endless in ({"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}):
        with pytest.raises(InvalidRequestError, match="can say nothing that meets it"):
            Grammar.compile(Constraint("json_schema", json.dumps(endless)), known)


HANGS = Constraint("grammar", "start: A\nA: " + " & ".join(f"/(.*[a-c]){{{n}}}/" for n in range(2, 200)))
OVERFLOWS = Constraint("grammar", "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(4000)) + 'r4000: "a"')


def test_what_ends_the_library_ends_a_process_of_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.model.grammar_trial.TRIAL_TIMEOUT_S", 1.0)
    trial = GrammarTrial(Tokens.of(tokenizer(), vocabulary=VOCABULARY, eos_token_ids=[EOS]))
    try:
        for bad in (HANGS, OVERFLOWS):
            with pytest.raises(InvalidRequestError, match="grammar cannot be followed: it is too complex"):
                trial.check(bad)
            assert trial._process is None
            trial.check(Constraint("regex", "ab"))
        with pytest.raises(InvalidRequestError, match="unclosed group"):
            trial.check(Constraint("regex", "("))
    finally:
        trial.close()


def test_a_constraint_is_compiled_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[Constraint] = []
    compile_one = Grammars._compile

    def counting(self: Grammars, constraint: Constraint) -> Grammar:
        compilations.append(constraint)
        return compile_one(self, constraint)

    monkeypatch.setattr(Grammars, "_compile", counting)
    monkeypatch.setattr(grammars_module, "MAX_WAITING", MAX_KEPT + 3)

    async def scenario() -> None:
        made = Grammars(tokenizer(), vocabulary=VOCABULARY, eos_token_ids=[EOS])
        assert await made.of(None) is None
        asked = partial(Constraint, "regex")
        same = await asyncio.gather(
            *(made.of(asked("ab")) for _ in range(5)), made.of(asked("(")), return_exceptions=True
        )
        assert len({id(each) for each in same[:5]}) == 1
        assert isinstance(same[5], InvalidRequestError)
        assert await made.of(asked("ab")) is same[0]
        assert len(compilations) == 2
        for number in range(MAX_KEPT + 3):
            await made.of(asked(f"a{{{number + 1}}}"))
            made.check_integrity()
        await made.of(asked("ab"))
        assert len(compilations) == 2 + MAX_KEPT + 3 + 1
        too_many = [made.of(asked(f"b{{{number + 1}}}")) for number in range(MAX_KEPT + 4)]
        outcomes = await asyncio.gather(*too_many, return_exceptions=True)
        assert [isinstance(each, ResourceExhaustedError) for each in outcomes].count(True) == 1
        made.close()

    asyncio.run(scenario())


def test_an_answer_whose_caller_left_is_compiled_for_the_others() -> None:
    async def scenario() -> None:
        made = Grammars(tokenizer(), vocabulary=VOCABULARY, eos_token_ids=[EOS])
        first, second = (asyncio.ensure_future(made.of(Constraint("regex", "ab"))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert await second is not None
        made.close()

    asyncio.run(scenario())


def test_a_model_without_a_known_tokenizer_has_no_constraints() -> None:
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        Tokens.of(object(), vocabulary=9, eos_token_ids=[])


def test_a_constraint_survives_the_wire() -> None:
    for constraint in (Constraint("json_schema", "{}"), Constraint("regex", "a"), Constraint("grammar", "start: /a/")):
        sampling = Sampling(max_new_tokens=3, constraint=constraint)
        assert Sampling.from_proto(sampling.to_proto(), default_max_new_tokens=1) == sampling
        assert not sampling.takes_highest
        assert not sampling.changes_logits
