"""Tool calls: offered by the chat template, and read by transformers' parser as the model's template declares."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from byte_level import train_tokenizer
from llguidance import LLMatcher, LLTokenizer

from slora_jax.engine.outputs import Delta
from slora_jax.engine.tokenizer import Tokenizer
from slora_jax.metrics import FinishReason
from slora_jax.serving.http.bodies import ChatBody
from slora_jax.serving.http.chat import prompt_of
from slora_jax.serving.http.errors import ApiError
from slora_jax.serving.http.shapes import ChatShape
from slora_jax.serving.http.token_text import TokenText

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool.function.name }}: {{ tool.function.parameters | tojson }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor %}</s>"
    "{% endfor %}assistant: "
)
RESPONSE_TEMPLATE = {
    "start_anchor": "assistant: ",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {"close": "</s>"},
        "tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True},
    },
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALLS = [{"name": "weather", "arguments": {"city": city}} for city in ("Köln", "Rome")]
ANSWER = "<think>Two cities.</think>Let me see. " + "".join(
    f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in CALLS
)


def make_service(response_template: dict | None = RESPONSE_TEMPLATE) -> SimpleNamespace:
    tokenizer = Tokenizer(
        train_tokenizer(),
        chat_template=CHAT_TEMPLATE,
        special_tokens={"eos_token": "</s>"},
        response_template=response_template,
    )
    engine = SimpleNamespace(tokenizer=tokenizer, max_model_len=1000)
    return SimpleNamespace(engine=engine, checked=lambda ids: ids)


def ask(**fields: object) -> ChatBody:
    return ChatBody(**{"messages": [{"role": "user", "content": "Weather?"}], "tools": TOOLS} | fields)


def shape_of(service: SimpleNamespace, body: ChatBody) -> ChatShape:
    prompt, tools = prompt_of(service, body)
    return ChatShape("base", TokenText(service.engine.tokenizer), [prompt], tools=tools)


def tokens_of(service: SimpleNamespace, text: str) -> list[int]:
    return service.engine.tokenizer(text)["input_ids"]


def ended() -> SimpleNamespace:
    return SimpleNamespace(finish_reason=FinishReason.STOP)


def test_template_gets_the_tools_and_the_calls_of_earlier_answers() -> None:
    service = make_service()
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ]
    prompt, _ = prompt_of(service, ask(messages=history))
    text = service.engine.tokenizer.decode(prompt)
    assert text.startswith(f"tool weather: {json.dumps(PARAMETERS)}\nuser: Weather?")
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in text
    assert "tool: sunny" in text
    assert "tool weather" not in service.engine.tokenizer.decode(prompt_of(service, ask(tool_choice="none"))[0])


def test_calls_are_read_from_a_whole_answer() -> None:
    service = make_service()
    tokens = tokens_of(service, ANSWER + "</s>")
    choice = shape_of(service, ask()).choice(0, Delta("", tokens, "", output=ended()))
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "Two cities.")
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    assert found == [(call["name"], call["arguments"]) for call in CALLS]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_streamed_pieces_add_up_to_the_whole_answer() -> None:
    service = make_service()
    shape, tokens = shape_of(service, ask()), tokens_of(service, ANSWER + "</s>")
    pieces = [shape.piece(0, Delta("", [token], "")) for token in tokens[:-1]]
    pieces.append(shape.piece(0, Delta("", tokens[-1:], "", output=ended())))
    deltas = [piece["delta"] for piece in pieces]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "Let me see."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Two cities."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [call["arguments"] for call in CALLS]
    assert [piece["finish_reason"] for piece in pieces[-2:]] == [None, "tool_calls"]


@pytest.mark.parametrize("text", ["Just text.", "First. <tool_call>{not json}</tool_call>"])
def test_answer_without_a_valid_call_is_content(text: str) -> None:
    service = make_service()
    shape, tokens = shape_of(service, ask()), tokens_of(service, text)
    whole = shape_of(service, ask()).choice(0, Delta("", tokens, "", output=ended()))
    assert whole["message"]["content"] == text and "tool_calls" not in whole["message"]
    assert whole["finish_reason"] == "stop"
    pieces = [shape.piece(0, Delta("", [token], "")) for token in tokens]
    pieces.append(shape.piece(0, Delta("", [], "", output=ended())))
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == text


def test_model_without_a_response_template_refuses_tools_by_name() -> None:
    answers_a_call = ask(tools=None, messages=[{"role": "user", "content": "Hi", "tool_call_id": "1"}])
    for template, body, words in (
        (None, ask(), "no response_template"),
        (None, answers_a_call, "no response_template"),
        ({"fields": {}}, ask(), "cannot use the model's"),
    ):
        with pytest.raises(ApiError, match=words) as raised:
            prompt_of(make_service(template), body)
        assert (raised.value.status_code, raised.value.code, raised.value.param) == (400, "not_supported", "tools")
    assert prompt_of(make_service(None), ask(tool_choice="none"))[1] is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop": "x"}, "tools exclude stop"),
        ({"guided_regex": "a"}, "tools exclude stop and a form"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls=false is not supported"),
        ({"tool_choice": "required", "tools": []}, "tool_choice goes with tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tools have no function 'time'"),
    ],
)
def test_fields_that_cannot_be_honoured_with_tools_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask(**fields)


FIELD = {"open": "<call>", "close": "</call>", "content": "json"}
EACH = {"transform": {"function": {"name": "{name}", "arguments": "{arguments}"}}, "transform_each": True}
WRAPPED = {"transform": {"function": {"name": "{content.name}", "arguments": "{content.parameters}"}}}


def with_calls(declared: dict) -> SimpleNamespace:
    """Returns a service whose model declares its calls so."""
    fields = {"content": {"close": "</s>"}} if "open" in declared else {}
    return make_service({"start_anchor": "assistant: ", "fields": fields | {"tool_calls": declared}})


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        (FIELD, '<call>{"name": "weather", "arguments": {"city": "Rome"}}'),
        (
            FIELD | WRAPPED | {"open": ["[CALL]", "<call>"]},
            '[CALL]\n{"name": "weather", "parameters": {"city":"Rome"}}',
        ),
        (FIELD | EACH | {"open": "<s>"}, '<s>[{"name": "weather", "arguments": {"city" : "Rome"}}]'),
    ],
)
def test_grammar_of_a_forced_call_allows_what_the_parser_reads_and_no_other(declared: dict, text: str) -> None:
    service = with_calls(declared)
    _, tools = prompt_of(service, ask(tool_choice="required", parallel_tool_calls=False))
    tokenizer = service.engine.tokenizer
    matcher = LLMatcher(LLTokenizer(tokenizer.backend_tokenizer.to_str()), tools.call_grammar)
    tokens = tokens_of(service, text)
    assert matcher.validate_tokens(tokens) == len(tokens)
    for wrong in (text.replace("weather", "time"), text.replace('"Rome"', "7"), "Rome"):
        assert matcher.validate_tokens(tokens_of(service, wrong)) < len(tokens_of(service, wrong))
    assert matcher.consume_tokens(tokens) and matcher.is_stopped()
    choice = shape_of(service, ask(tool_choice="required")).choice(0, Delta("", tokens, "", output=ended()))
    [call] = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Rome"})


@pytest.mark.parametrize(
    "declared",
    [{"content": "json"}, FIELD | {"content": "kv-lines"}, FIELD | {"transform": {"name": "{content.tool}"}}],
)
def test_call_of_another_form_cannot_be_forced(declared: dict) -> None:
    with pytest.raises(ApiError, match="a call cannot be forced") as raised:
        prompt_of(with_calls(declared), ask(tool_choice="required"))
    assert (raised.value.status_code, raised.value.code, raised.value.param) == (400, "not_supported", "tool_choice")
