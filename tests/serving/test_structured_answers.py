"""The public `openai` client gets text in the form that it asks for, and vLLM's tokenization endpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jsonschema
import openai
import pytest
from live_server import SERVE_KEY, LiveServer

from slora_jax import Engine

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["fox", "dog"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
ASK = {"model": "adapter-1", "messages": [{"role": "user", "content": "Which?"}], "max_tokens": 60}


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=SERVE_KEY, max_retries=0) as client:
        yield client


def response_format(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_response_format_gives_json_of_the_schema_whole_and_streamed(client) -> None:
    ask = ASK | {"response_format": response_format(SCHEMA), "temperature": 1.2, "seed": 3}
    [choice] = client.chat.completions.create(**ask).choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    parts = [part.choices[0] for part in client.chat.completions.create(**ask, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content
    assert parts[-1].finish_reason == "stop"
    started = client.chat.completions.create(**ask | {"response_format": {"type": "json_object"}}).choices[0]
    assert started.message.content.strip()[:1] in ("{", "")


def test_guided_fields_and_structured_outputs_are_vllms(client) -> None:
    fields = [
        ({"guided_json": SCHEMA}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: json.loads(text)["kind"] in ("fox", "dog")),
        ({"guided_regex": "[0-9]{4}"}, lambda text: text.isdigit() and len(text) == 4),
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"guided_grammar": 'root ::= "a" [0-9] "b"'}, lambda text: (text[0], text[2:]) == ("a", "b")),
        ({"structured_outputs": {"choice": ["maybe"]}}, lambda text: text == "maybe"),
        ({"structured_outputs": {"json": SCHEMA}}, lambda text: "ok" in json.loads(text)),
    ]
    for extra, is_right in fields:
        answer = client.completions.create(model="base", prompt=["One", "Two"], n=2, max_tokens=60, extra_body=extra)
        for choice in answer.choices:
            assert choice.finish_reason == "stop" and is_right(choice.text), (extra, choice.text)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": {"type": "objekt"}}, "guided_json", "guided_json="),
        ({"response_format": response_format({"type": "objekt"})}, "response_format", "objekt"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"guided_regex": "(["}, "guided_regex", "guided_regex='(['"),
        ({"guided_choice": []}, "guided_choice", "a list of strings"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "unknown field"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, None, "guided_regex and guided_choice: give one"),
        ({"logit_bias": {"400": 1}}, "logit_bias", "must be in [0, 319]"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
        ({"priority": 3}, "priority", "the policy Fcfs takes no priority"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_form_is_400_and_names_the_field_and_the_reason(server, fields, param, words) -> None:
    body = {"prompt": "x", "max_tokens": 2} | fields
    status, answer = server.post("/v1/completions", body, SERVE_KEY)
    assert status == 400 and answer["error"]["param"] == param, answer
    assert words in answer["error"]["message"], answer


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"sight", "smell"}), ({"type": "function", "function": {"name": "smell"}}, {"smell"})],
)
def test_forced_call_has_a_wanted_name_and_arguments_of_the_schema(client, choice, names) -> None:
    ask = ASK | {"max_tokens": 90, "tools": [tool("sight"), tool("smell")], "tool_choice": choice, "seed": 1}
    answer = client.chat.completions.create(**ask).choices[0]
    [call] = answer.message.tool_calls
    assert call.function.name in names and answer.finish_reason == "tool_calls" and not answer.message.content
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    deltas = [part.choices[0].delta for part in client.chat.completions.create(**ask, stream=True)]
    [streamed] = [call for delta in deltas for call in delta.tool_calls or ()]
    assert streamed.function.model_dump() == call.function.model_dump()


def test_choice_of_a_missing_tool_or_an_invalid_schema_is_400(client) -> None:
    wrong = {"type": "function", "function": {"name": "weather", "parameters": {"type": "objekt"}}}
    for tools, name, words in (([tool("sight")], "weather", "no function 'weather'"), ([wrong], "weather", "objekt")):
        choice = {"type": "function", "function": {"name": name}}
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(**ASK, tools=tools, tool_choice=choice)


def test_logit_bias_and_zero_priority_are_honoured(client) -> None:
    ask = {"model": "base", "prompt": "x", "max_tokens": 3, "logit_bias": {"77": 100}}
    answer = client.completions.create(**ask, extra_body={"priority": 0, "return_token_ids": True})
    assert answer.choices[0].token_ids == [77] * 3


def test_base_and_adapter_may_be_named_together(client) -> None:
    ask = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}
    texts = [client.completions.create(model=name, **ask).choices[0].text for name in ("adapter-2", "base:adapter-2")]
    assert texts[0] == texts[1]
    assert client.models.retrieve("base:adapter-2").parent == "base"
    for name in ("base:", "base:absent", "other:adapter-2"):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=name, **ask)


def test_tokenize_and_detokenize_are_the_engines(server, engine: Engine) -> None:
    text, tokenizer = "Un œuf 猫", engine.tokenizer
    status, answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}, SERVE_KEY)
    ids = tokenizer(text)["input_ids"]
    assert status == 200 and answer["tokens"] == ids and answer["count"] == len(ids)
    assert answer["max_model_len"] == 128 and len(answer["token_strs"]) == len(ids)
    assert server.post("/detokenize", {"model": "adapter-1", "tokens": ids}, SERVE_KEY) == (200, {"prompt": text})
    messages = [{"role": "user", "content": "Hi"}]
    _, chat = server.post("/tokenize", {"messages": messages}, SERVE_KEY)
    assert tokenizer.decode(chat["tokens"]) == "user: Hi\nassistant: " and chat["token_strs"] is None
    for path, body, words in (
        ("/tokenize", {}, "give one of prompt and messages"),
        ("/tokenize", {"prompt": "a b " * 10_000}, "max_model_len=128"),
        ("/detokenize", {"tokens": [320]}, "outside the vocabulary"),
    ):
        status, answer = server.post(path, body, SERVE_KEY)
        assert status == 400 and words in answer["error"]["message"], answer
    assert server.post("/tokenize", {"prompt": "x", "model": "absent"}, SERVE_KEY)[0] == 404
