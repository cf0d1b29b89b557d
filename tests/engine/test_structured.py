"""Structured output and logit biases: every token is the best that llguidance's own matcher allows."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import jsonschema
import llguidance
import numpy as np
import pytest
from byte_level import VOCAB_SIZE, train_tokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from tiny_model import EOS, TinyModel

from slora_jax import ConfigError, Engine, RequestError, SamplingParams, StructuredOutputs
from slora_jax.adapters import random_adapter
from slora_jax.engine.structured import Grammars
from slora_jax.engine.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["fox", "dog"]}, "n": {"type": "integer"}},
    "required": ["ok", "kind", "n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
NUMBER = SCHEMA | {"properties": SCHEMA["properties"] | {"n": {"type": "integer", "minimum": 0, "maximum": 999}}}
REGEX = r"(fox|dog)s? [0-9]{3,5}!"
FORMS = {
    "json": {"json": NUMBER},
    "regex": {"regex": REGEX},
    "choice": {"choice": ["猫は走る", "lazy dog", "lazy"]},
    "grammar": {"grammar": 'start: "a" inner "z"\ninner: /[0-9]/ | "(" inner ")"'},
}
FREE = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2)
PROMPT = [40, 41, 42]


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with tiny.engine(Tokenizer(train_tokenizer(), special_tokens={"eos_token": "</s>"}), keep_logits=True) as engine:
        engine.load_adapter("a", random_adapter(tiny.geometry, 4, seed=1))
        yield engine
        engine.check()


def is_valid(kind: str, text: str) -> bool:
    match kind:
        case "json":
            jsonschema.validate(json.loads(text), NUMBER)
            return True
        case "regex":
            return re.fullmatch(REGEX, text) is not None
        case "choice":
            return text in FORMS["choice"]["choice"]
    return re.fullmatch(r"a\(*[0-9]\)*z", text) is not None and text.count("(") == text.count(")")


def allowed_logits(form: dict, tokens: list[int], logits: np.ndarray) -> np.ndarray:
    """Masks the logits of each token with a matcher of llguidance, made without this project's code."""
    tokenizer = llguidance.LLTokenizer(train_tokenizer().to_str(), n_vocab=VOCAB_SIZE, eos_token=EOS)
    [(kind, source)] = form.items()
    text = source if isinstance(source, str) else json.dumps(source)
    matcher = llguidance.LLMatcher(tokenizer, llguidance.grammar_from(kind, text))
    masked, mask = logits.copy(), allocate_token_bitmask(1, VOCAB_SIZE)
    for token, row in zip(tokens, masked, strict=True):
        fill_next_token_bitmask(matcher, mask)
        apply_token_bitmask_inplace(row, mask)
        assert matcher.consume_token(token)
    return masked


@pytest.mark.parametrize("kind", FORMS)
def test_each_greedy_token_is_the_best_that_the_grammar_allows(kind: str, engine: Engine) -> None:
    params = SamplingParams(max_tokens=60, structured_outputs=FORMS[kind], logprobs=1)
    outputs = engine.generate([PROMPT, [7, 8], PROMPT], params, ["a", None, None])
    for output in outputs:
        masked = allowed_logits(FORMS[kind], output.token_ids, output.logits)
        assert output.token_ids == masked.argmax(-1).tolist()
        if output.finish_reason == "stop":
            assert is_valid(kind, output.text)
    assert any(output.finish_reason == "stop" for output in outputs)
    for token, entry, row in zip(output.token_ids, output.logprobs, output.logits, strict=True):
        expected = row[token] - np.log(np.exp(row.astype(np.float64) - row.max()).sum()) - row.max()
        assert entry.logprob == pytest.approx(expected, abs=1e-4), "log-probabilities are the model's own"


@pytest.mark.parametrize("kind", FORMS)
def test_sampled_text_is_valid_and_ends_with_stop(kind: str, engine: Engine) -> None:
    params = [
        SamplingParams(
            max_tokens=80, temperature=1.5, top_k=50 * (i % 2), top_p=(1, 0.9)[i % 2], seed=i, ignore_eos=i > 3,
            structured_outputs=FORMS[kind],
        )
        for i in range(6)
    ]  # fmt: skip
    outputs = engine.generate([PROMPT] * 6, params)
    for output in outputs:
        masked = allowed_logits(FORMS[kind], output.token_ids, output.logits)
        assert np.isfinite(masked[np.arange(len(masked)), output.token_ids]).all()
        assert output.finish_reason == "stop" and is_valid(kind, output.text), output.text
    assert len({output.text for output in outputs}) > 1


def test_free_requests_in_the_batch_get_the_same_tokens_and_logprobs(engine: Engine) -> None:
    free = [FREE, replace(FREE, temperature=1.0, top_k=9, seed=5), replace(FREE, temperature=0.7, seed=6)]
    other = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True)
    prompts = [PROMPT, [9, 8, 7], [5] * 20, PROMPT]
    alone = engine.generate(prompts, [*free, other])
    for edit in ({"structured_outputs": {"regex": "[a-z]{40}"}}, {"logit_bias": {7: 100}}):
        mixed = engine.generate(prompts, [*free, replace(other, **edit)])
        assert mixed[3].token_ids != alone[3].token_ids
        for one, expected in zip(mixed[:3], alone[:3], strict=True):
            assert one.token_ids == expected.token_ids and one.logprobs == expected.logprobs


@pytest.mark.parametrize(
    ("form", "limit"),
    [
        ({"regex": "[ab](a{1000}){1000}"}, "step_lexer_fuel=20000"),
        ({"grammar": "start: s\ns: /[ab]/ | " + " | ".join("s " * n for n in range(2, 9))}, "max is 500"),
    ],
)
def test_grammar_that_exceeds_a_limit_fails_alone_and_names_it(form: dict, limit: str, engine: Engine) -> None:
    number = replace(FREE, structured_outputs={"regex": "[0-9]{40}"})
    expected = engine.generate([PROMPT, PROMPT], [FREE, number])
    hostile = replace(FREE, structured_outputs=form, logit_bias={EOS: -100})
    failed, *others = engine.generate([PROMPT] * 3, [hostile, FREE, number])
    assert failed.finish_reason == "error" and limit in failed.error
    for other, one in zip(others, expected, strict=True):
        assert other.token_ids == one.token_ids and other.logprobs == one.logprobs


def test_thousand_choices_are_within_the_limits(engine: Engine) -> None:
    choices = [f"number {i}" for i in range(1000)]
    output = engine.generate([PROMPT], SamplingParams(max_tokens=60, structured_outputs={"choice": choices}))[0]
    assert output.text in choices


def test_constrained_request_takes_part_in_every_step(engine: Engine) -> None:
    steps = []
    for form in (None, {"regex": "[a-z ]{60}"}):
        before = engine.stats().steps
        output = engine.generate([PROMPT], SamplingParams(max_tokens=20, ignore_eos=True, structured_outputs=form))[0]
        assert len(output.token_ids) == 20
        steps.append(engine.stats().steps - before)
    assert steps[0] == steps[1]


def test_preempted_constrained_requests_get_the_same_tokens(engine: Engine, squeeze) -> None:
    form = {"regex": "[a-z]{1,9}( [a-z]{1,9}){9}"}
    params = [SamplingParams(max_tokens=40, temperature=1.0, seed=i, structured_outputs=form) for i in range(4)]
    prompts = [[40 + i] * 20 for i in range(4)]
    expected = [engine.generate([p], one)[0].token_ids for p, one in zip(prompts, params, strict=True)]
    with squeeze(engine, pages=22):
        before = engine.stats().preemptions
        outputs = engine.generate(prompts, params)
        assert engine.stats().preemptions > before
    assert [output.token_ids for output in outputs] == expected


def test_cancelled_constrained_request_leaves_the_others_alone(engine: Engine) -> None:
    form = {"regex": "[a-z]{50}"}
    expected = engine.generate([PROMPT], replace(FREE, structured_outputs=form))[0].token_ids
    kept = engine.add_request(PROMPT, replace(FREE, structured_outputs=form))
    gone = engine.add_request([7, 8], replace(FREE, structured_outputs=form))
    outputs = {}
    for step in range(200):
        if step == 4:
            engine.cancel(gone)
        outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output is not None}
        if not engine.has_work():
            break
    assert outputs[kept].token_ids == expected and outputs[gone].finish_reason == "cancelled"


def test_logit_bias_is_added_before_sampling(engine: Engine) -> None:
    bias = {5: 4.0, 9: -100.0, 300: 2.5, **{token: -50.0 for token in range(100, 200)}}
    output = engine.generate([PROMPT], replace(FREE, logit_bias=bias))[0]
    biased = output.logits.copy()
    biased[:, list(bias)] += np.float32(list(bias.values()))
    assert output.token_ids == biased.argmax(-1).tolist()
    assert output.token_ids != output.logits.argmax(-1).tolist()
    forced = engine.generate([PROMPT], SamplingParams(max_tokens=5, temperature=1.0, logit_bias={77: 100}))[0]
    assert forced.token_ids == [77] * 5


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json": {"type": "objekt"}}, "objekt"),
        ({"json": '{"type":'}, "structured_outputs.json="),
        ({"json": {"$ref": "https://example.org/schema"}}, "structured_outputs.json="),
        ({"regex": "(["}, "structured_outputs.regex='(['"),
        ({"grammar": "start: absent"}, "structured_outputs.grammar="),
        ({"regex": "a" * 70_000}, "must have at most 65536"),
        ({"regex": "(a{1000}){1000}"}, "initial_lexer_fuel=300000"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice: must be one of"),
        ({}, "give exactly one"),
        ({"choice": []}, "a list of strings"),
        ({"jsn": "{}"}, "did you mean 'json'"),
    ],
)  # fmt: skip
def test_invalid_form_is_refused_with_the_reason(form: dict, words: str, engine: Engine) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        engine.add_request(PROMPT, SamplingParams(structured_outputs=form))
    assert not engine.has_work()


def test_bias_outside_the_vocabulary_or_range_is_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"logit_bias=320: the token must be in \[0, 319\]"):
        engine.add_request(PROMPT, SamplingParams(logit_bias={320: 1.0}))
    for bias in ({5: 101}, {-1: 1}, {"5": 1}, dict.fromkeys(range(301), 1.0)):
        with pytest.raises(ConfigError, match="logit_bias"):
            SamplingParams(logit_bias=bias)


def test_missing_package_or_tokenizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    form = StructuredOutputs(regex="a")
    with pytest.raises(RequestError, match="needs a tokenizer"):
        Grammars(None, VOCAB_SIZE, [EOS]).compile(form)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match="needs the package llguidance"):
        Grammars(Tokenizer(train_tokenizer()), VOCAB_SIZE, [EOS]).compile(form)


def test_grammar_that_cannot_continue_accepts_no_token(engine: Engine) -> None:
    grammar = engine.grammars.compile(StructuredOutputs(regex="ab"))
    assert "cannot continue" in grammar.accept(5)
    row = np.zeros(VOCAB_SIZE // 32 + 1, np.int32)  # with a word of padding
    grammar.copy().fill(row)
    grammar.fill(row)
    assert (row == -1).all() and grammar.accept(5) is not None
