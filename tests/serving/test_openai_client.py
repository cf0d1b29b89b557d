"""The public `openai` client, unmodified, gets the engine's own tokens for everything that it can ask for."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from live_server import MANAGE_KEY, SERVE_KEY, LiveServer

from slora_jax import Engine, SamplingParams

PROMPT = "List all users of the"
TOKENS = {"extra_body": {"return_token_ids": True}}


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=SERVE_KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(engine: Engine):
    def generate(prompt, adapter: str | None = None, **params):
        [output] = engine.generate([prompt], SamplingParams(**params), [adapter])
        return output

    return generate


def test_completions_equal_the_engines(client, expected) -> None:
    greedy = set()
    for adapter, temperature in ((None, 0.0), ("adapter-0", 0.0), ("adapter-1", 0.0), (None, 0.9), ("adapter-2", 0.9)):
        answer = client.completions.create(
            model=adapter or "base", prompt=PROMPT, max_tokens=20, temperature=temperature, seed=7, **TOKENS
        )
        output = expected(PROMPT, adapter, max_tokens=20, temperature=temperature, seed=7)
        [choice] = answer.choices
        assert choice.token_ids == output.token_ids and choice.text == output.text
        assert choice.finish_reason == output.finish_reason
        usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
        prompt = len(output.prompt_token_ids)
        assert usage == (prompt, len(output.token_ids), prompt + len(output.token_ids))
        assert answer.model == (adapter or "base") and answer.object == "text_completion"
        if not temperature:
            greedy.add(choice.text)
    assert len(greedy) == 3, "each adapter answers differently"


def test_streamed_completion_equals_the_whole_one(client) -> None:
    ask = {"model": "adapter-3", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 3}
    ask["extra_body"] = {"return_token_ids": True, "ignore_eos": True}
    whole = client.completions.create(**ask)
    pieces = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    *parts, last = pieces
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert [token for part in parts for token in part.choices[0].token_ids] == whole.choices[0].token_ids
    assert len(parts) > 1, "all tokens came at once"
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices[0].finish_reason == "length"
    assert not last.choices and last.usage.completion_tokens == 24
    assert len({piece.id for piece in pieces}) == 1


def test_usage_counts_each_prompt_once_and_comes_with_every_event_if_asked_for(client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    ask = {"model": "base", "prompt": ["Hello", "Hello"], "n": 2, "max_tokens": 3, "extra_body": {"ignore_eos": True}}
    one = client.completions.create(**ask | {"prompt": "Hello"}).usage.prompt_tokens
    assert client.completions.create(**ask).usage.prompt_tokens == 2 * one
    *parts, last = client.completions.create(**ask, stream=True, stream_options=options)
    generated = [part.usage.completion_tokens for part in parts]
    assert generated == sorted(generated) and generated[-1] == last.usage.completion_tokens == 12
    assert {part.usage.prompt_tokens for part in [*parts, last]} == {2 * one}


def test_several_prompts_and_choices_keep_their_order(client, expected) -> None:
    prompts = ["One", "Two and three"]
    answer = client.completions.create(
        model="adapter-1", prompt=prompts, n=2, max_tokens=9, temperature=1.0, seed=2**32 - 1, **TOKENS
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, (prompt, seed) in zip(answer.choices, [(p, s) for p in prompts for s in (2**32 - 1, 0)], strict=True):
        output = expected(prompt, "adapter-1", max_tokens=9, temperature=1.0, seed=seed)
        assert choice.token_ids == output.token_ids
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)


def test_streamed_choices_have_their_index(client) -> None:
    ask = {"model": "adapter-1", "prompt": ["One", "Two"], "n": 2, "max_tokens": 12, "seed": 5}
    whole = client.completions.create(**ask)
    texts = ["", "", "", ""]
    for piece in client.completions.create(**ask, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_prompt_may_be_token_ids(client, expected) -> None:
    ids = [5, 300, 17, 42]
    answer = client.completions.create(model="adapter-2", prompt=ids, max_tokens=6, temperature=0, **TOKENS)
    assert answer.choices[0].token_ids == expected(ids, "adapter-2", max_tokens=6).token_ids
    assert answer.usage.prompt_tokens == 4


def test_stop_string_ends_the_text_before_it(client, expected) -> None:
    text = expected(PROMPT, None, max_tokens=40, temperature=1.0, seed=1).text
    stop = text[len(text) // 2 :][:2]
    answer = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=40, temperature=1.0, seed=1, stop=[stop, "never this"]
    )
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_equal_the_engines(client, expected, stream) -> None:
    ask = {"model": "adapter-0", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 3}
    output = expected(PROMPT, "adapter-0", max_tokens=6, logprobs=3)
    answers = client.completions.create(**ask, stream=True) if stream else [client.completions.create(**ask)]
    parts = [answer.choices[0].logprobs for answer in answers]
    chosen = [value for part in parts for value in part.token_logprobs]
    assert chosen == pytest.approx([one.logprob for one in output.logprobs], abs=1e-5)
    best = [max(values.values()) for part in parts for values in part.top_logprobs]
    assert best == pytest.approx([one.top[0][1] for one in output.logprobs], abs=1e-5)
    assert "".join(token for part in parts for token in part.tokens) or output.text == ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, [5, 300, 17, 42, 8]], ids=["text", "ids"])
def test_echo_precedes_the_text_and_logprobs_score_it(client, expected, prompt, stream) -> None:
    ask = {"model": "adapter-1", "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": True}
    plain = client.completions.create(**ask | {"echo": False}).choices[0].text
    output = expected(prompt, "adapter-1", max_tokens=4, logprobs=2, prompt_logprobs=2)
    answers = list(client.completions.create(**ask, stream=True)) if stream else [client.completions.create(**ask)]
    text = "".join(answer.choices[0].text for answer in answers)
    assert text.endswith(plain) and (text == PROMPT + plain or prompt != PROMPT)
    parts = [answer.choices[0].logprobs for answer in answers]
    values = [value for part in parts for value in part.token_logprobs]
    scored = [one and one.logprob for one in [*output.prompt_logprobs, *output.logprobs]]
    assert values[0] is None and values[1:] == pytest.approx(scored[1:], abs=1e-5)
    best = [top and max(top.values()) for part in parts for top in part.top_logprobs]
    assert best[1:] == pytest.approx(
        [one.top[0][1] for one in [*output.prompt_logprobs, *output.logprobs][1:]], abs=1e-5
    )
    assert all(len(top) == 2 for part in parts for top in part.top_logprobs if top)
    tokens = [token for part in parts for token in part.tokens]
    offsets = [at for part in parts for at in part.text_offset]
    for token, at in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text.startswith(token, at) or at == len(text)


@pytest.mark.parametrize("echo", [False, True])
def test_prompt_logprobs_are_keyed_by_token_id(client, expected, echo) -> None:
    ids = [5, 300, 17, 42]
    ask = {"model": "adapter-1", "prompt": ids, "max_tokens": 1, "echo": echo, "extra_body": {"prompt_logprobs": 1}}
    first, *rest = client.completions.create(**ask).choices[0].prompt_logprobs
    output = expected(ids, "adapter-1", max_tokens=1, prompt_logprobs=1)
    assert first is None
    for token, entry, one in zip(ids[1:], rest, output.prompt_logprobs[1:], strict=True):
        assert entry[str(token)]["logprob"] == pytest.approx(one.logprob, abs=1e-5)
        best, value = one.top[0]
        assert entry[str(best)]["rank"] == 1 and entry[str(best)]["logprob"] == pytest.approx(value, abs=1e-5)


MESSAGES = [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": "Who are you?"}]


def test_chat_uses_the_models_template(client, expected, engine) -> None:
    answer = client.chat.completions.create(
        model="adapter-4", messages=MESSAGES, max_completion_tokens=15, temperature=0.7, seed=11, **TOKENS
    )
    text = engine.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    output = expected(ids, "adapter-4", max_tokens=15, temperature=0.7, seed=11)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", output.text)
    assert choice.token_ids == output.token_ids and choice.finish_reason == output.finish_reason
    assert answer.usage.prompt_tokens == len(ids) and answer.object == "chat.completion"


def test_streamed_chat_equals_the_whole_one(client) -> None:
    ask = {"model": "adapter-4", "messages": MESSAGES, "max_tokens": 15, "temperature": 0.7, "seed": 11, "n": 2}
    whole = client.chat.completions.create(**ask)
    texts, roles, reasons = ["", ""], {}, {}
    for piece in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        if not piece.choices:
            assert piece.usage == whole.usage.model_copy(
                update={"prompt_tokens_details": piece.usage.prompt_tokens_details}
            )
            continue
        [choice] = piece.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.delta.role:
            roles[choice.index] = choice.delta.role
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == {0: "assistant", 1: "assistant"}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


def test_stream_helper_of_the_client_works(client) -> None:
    with client.chat.completions.stream(model="base", messages=MESSAGES, max_tokens=8, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    whole = client.chat.completions.create(model="base", messages=MESSAGES, max_tokens=8, temperature=0)
    assert text == whole.choices[0].message.content


def test_chat_logprobs_equal_the_engines(client, expected, engine) -> None:
    answer = client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    text = engine.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    output = expected(ids, None, max_tokens=5, logprobs=2)
    values = answer.choices[0].logprobs.content
    assert [one.logprob for one in values] == pytest.approx([one.logprob for one in output.logprobs], abs=1e-5)
    assert all(len(one.top_logprobs) == 2 for one in values)


def test_conversation_sends_its_answers_back(client, expected, engine) -> None:
    messages: list = []
    for turn in "abc":
        messages.append({"role": "user", "content": turn})
        answer = client.chat.completions.create(model="adapter-2", messages=messages, max_tokens=2, temperature=0)
        text = engine.tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} if isinstance(m, dict) else
             {"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=True,
        )  # fmt: skip
        ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert answer.choices[0].message.content == expected(ids, "adapter-2", max_tokens=2).text
        messages.append(answer.choices[0].message)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}, None),
        ({"type": "text"}, None),
        ({"tool_calls": [{"id": "1"}]}, "messages.0.tool_calls.0.function"),
        ({"thinking": "aloud"}, "messages.0.thinking"),
    ],
)
def test_empty_fields_of_messages_are_accepted_and_others_refused(client, fields, param) -> None:
    ask = {"model": "base", "messages": [{"role": "user", "content": "Hi", **fields}], "max_tokens": 2}
    if param is None:
        assert client.chat.completions.create(**ask).choices
    else:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**ask)
        assert raised.value.param == param


def test_unsupported_fields_are_accepted_only_without_effect(client) -> None:
    ask = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    neutral = {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"},
        "logit_bias": {}, "service_tier": "auto", "store": False, "frequency_penalty": 0, "presence_penalty": 0.0,
        "modalities": ["text"], "extra_body": {"audio": None, "prediction": None, "metadata": None, "made_up": []},
    }  # fmt: skip
    assert client.chat.completions.create(**ask, **neutral).choices
    asked = {"frequency_penalty": 0.1, "modalities": ["audio"], "reasoning_effort": "low"}
    for field, value in asked.items():
        with pytest.raises(openai.BadRequestError, match=f"{field}: slora-jax does not support this") as raised:
            client.chat.completions.create(**ask, **{field: value})
        assert raised.value.code == "not_supported" and raised.value.param == field


def test_max_tokens_beyond_the_model_is_lowered_with_a_header(client) -> None:
    ask = {"model": "base", "prompt": [5] * 122, "extra_body": {"ignore_eos": True}}
    raw = client.completions.with_raw_response.create(**ask, max_tokens=50)
    assert raw.headers["X-Max-Tokens-Lowered-To"] == "6" and raw.parse().usage.completion_tokens == 6
    assert "X-Max-Tokens-Lowered-To" not in client.completions.with_raw_response.create(**ask, max_tokens=6).headers


def test_models_lists_the_base_and_the_adapters(client) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "base" and {f"adapter-{i}" for i in range(12)} <= set(names)
    assert client.models.retrieve("adapter-3").id == "adapter-3"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("adapter-333")


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"temperature": -0.5}, "temperature", "temperature=-0.5"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"n": 1000}, "n", "n=1000"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [1, 999999]}, "prompt", "999999"),
        ({"prompt": [[1, 2], []]}, "prompt.1", "at least 1 item"),
        ({"prompt": ["x", 2]}, "prompt.1", "2"),
        ({"prompt": [5] * 200}, "prompt", "max_model_len=128"),
        ({"prompt": "x", "stop": [""]}, "stop.0", "at least 1 character"),
        ({"logprobs": 50}, "logprobs", "less than or equal to 20"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not support this; leave the field out (found 0.5)"),
        ({"extra_body": {"min_tokens": 3}}, "min_tokens", "slora-jax does not support this"),
        ({"extra_body": {"max_token": 3}}, "max_token", "unknown field 'max_token'"),
        (
            {"echo": True, "logprobs": 1, "extra_body": {"prompt_logprobs": 3}},
            None,
            "prompt_logprobs must equal logprobs",
        ),
        ({"best_of": 4}, None, "best_of must equal n"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_field_is_named(client, changes, param, words) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**{"model": "base", "prompt": PROMPT} | changes)
    assert raised.value.param == param and words in raised.value.message, raised.value.message
    assert raised.value.type == "invalid_request_error"


def test_unknown_model_is_404_and_names_the_nearest(client) -> None:
    with pytest.raises(openai.NotFoundError, match="adapter-1") as raised:
        client.completions.create(model="adaptor-1", prompt=PROMPT)
    assert raised.value.code == "model_not_found" and raised.value.param == "model"


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user", "content": 3}], [{"content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}]],
    ids=["none", "number", "no-role", "image"],
)
def test_malformed_messages_are_refused(client, messages) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="base", messages=messages)


def test_keys_and_rights(server, client, files) -> None:
    for key in ("wrong", "", "sk-servex"):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key or "x", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError) as raised:
                stranger.completions.create(model="base", prompt=PROMPT)
            assert raised.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()
    load = {"lora_name": "mine", "lora_path": str(files.adapters / "adapter-1")}
    status, answer = server.post("/v1/load_lora_adapter", load, SERVE_KEY)
    assert status == 403 and answer["error"]["type"] == "permission_error" and "manage" in answer["error"]["message"]
    assert server.post("/v1/load_lora_adapter", load)[0] == 401
    assert server.get("/metrics")[0] == 401 and server.get("/health")[0] == 200
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, MANAGE_KEY)[0] == 200
