"""The public interface: stopping, streaming, lists of parameters, refusals, statistics."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from slora_jax import AdapterError, ConfigError, Engine, EngineConfig, RequestError, SamplingParams
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.typed import FORMER_NAMES

PROMPT = "The quick brown"
LONG = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture
def answer(engine: Engine):
    """The greedy continuation of `PROMPT`; its tokens vary."""
    output = engine.generate(PROMPT, LONG)[0]
    assert len(set(output.token_ids)) > 8
    return output


# Stopping


def test_max_tokens_ends_with_length(engine, answer) -> None:
    output = engine.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))[0]
    assert (output.token_ids, output.finish_reason) == (answer.token_ids[:5], "length")
    assert output.text == engine.tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_no_max_tokens_runs_to_the_engines_longest_length(engine) -> None:
    output = engine.generate([list(range(2, 92))], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert (len(output.token_ids), output.finish_reason) == (96 - 90, "length")


def test_max_tokens_beyond_the_longest_length_warns_and_ends_there(engine) -> None:
    with pytest.warns(UserWarning, match=r"max_tokens=50: max_model_len=96 leaves room for 1 beside the prompt's 95"):
        output = engine.generate([list(range(2, 97))], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_no_max_tokens_runs_to_what_the_pool_holds_beside_the_adapter(engine, tiny, monkeypatch) -> None:
    pages = engine.load_adapter("a", random_adapter(tiny.geometry, 4, seed=0)).num_pages
    monkeypatch.setattr(type(engine.allocator), "capacity", pages + 5)
    assert engine.longest_request() == min(96, (pages + 5) * 8 + 1)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    assert len(engine.generate([[5] * 15], params, "a")[0].token_ids) == 5 * 8 + 1 - 15
    with pytest.raises(RequestError, match="can never fit"):
        engine.generate([[5] * 42], params, "a")


def test_stop_token_is_in_the_tokens_and_not_in_the_text(engine, answer) -> None:
    stop = answer.token_ids[6]
    count = answer.token_ids.index(stop) + 1
    output = engine.generate(PROMPT, SamplingParams(max_tokens=24, stop_token_ids=[stop], ignore_eos=True))[0]
    assert (output.token_ids, output.finish_reason) == (answer.token_ids[:count], "stop")
    assert output.text == engine.tokenizer.decode(answer.token_ids[: count - 1], skip_special_tokens=True)


def test_end_of_sequence_token_ends_unless_ignored(engine, answer, monkeypatch) -> None:
    eos = answer.token_ids[5]
    monkeypatch.setattr(engine, "model", type("Model", (), {"eos_token_ids": (eos,), "vocab_size": 320})())
    count = answer.token_ids.index(eos) + 1
    stopped, ignored = engine.generate([PROMPT] * 2, [SamplingParams(max_tokens=24), LONG])
    assert (stopped.token_ids, stopped.finish_reason) == (answer.token_ids[:count], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == (answer.token_ids, "length")


@pytest.mark.parametrize("length", [2, 3, 5])
def test_stop_string_across_token_borders_cuts_the_text_before_it(engine, answer, length) -> None:
    at = len(answer.text) // 2
    stop = answer.text[at : at + length]
    output = engine.generate(PROMPT, SamplingParams(max_tokens=24, stop=stop, ignore_eos=True))[0]
    assert output.finish_reason == "stop"
    assert output.text == answer.text[: answer.text.index(stop)]
    assert len(output.token_ids) < len(answer.token_ids)
    assert output.token_ids == answer.token_ids[: len(output.token_ids)]


# Streaming


def test_stream_adds_up_to_the_output(engine, answer) -> None:
    deltas = list(engine.stream(PROMPT, LONG))
    output = deltas[-1].output
    assert output is not None and [delta.output for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert [token for delta in deltas for token in delta.token_ids] == output.token_ids == answer.token_ids
    assert "".join(delta.text for delta in deltas) == output.text == answer.text
    assert deltas[-1].finish_reason == "length" and deltas[0].finish_reason is None
    assert len(deltas) > 10


def test_stop_string_never_leaks_into_the_stream(engine, answer) -> None:
    at = len(answer.text) // 2
    stop = answer.text[at : at + 4]
    streamed = ""
    for delta in engine.stream(PROMPT, SamplingParams(max_tokens=24, stop=["never met", stop], ignore_eos=True)):
        streamed += delta.text
        assert answer.text[: answer.text.index(stop)].startswith(streamed)
    assert streamed == delta.output.text == answer.text[: answer.text.index(stop)]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_a_stream_cancels_its_request(engine, taken) -> None:
    stream = engine.stream(PROMPT, LONG)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert engine.stats().running == engine.stats().waiting == engine.stats().pages.kv == 0
    while engine.has_work():
        engine.step()


def test_requests_added_during_a_stream_run_along(engine) -> None:
    stream = engine.stream(PROMPT, LONG)
    next(stream)
    other = engine.add_request([5, 6], SamplingParams(max_tokens=2))
    assert all(delta.request_id != other for delta in stream)
    later = [delta for _ in range(2) for delta in engine.step()]
    assert {delta.request_id for delta in later} == {other} and later[-1].output is not None


# Lists


def test_lists_of_prompts_params_and_adapters_pair_up_in_order(engine, tiny) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        engine.load_adapter(name, random_adapter(tiny.geometry, 4, seed=seed))
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 4, 7, 2, 6)]
    prompts = [PROMPT, [7], np.array([9, 9]), "fox", [3] * 50, "猫"]
    adapters = ["a", None, "b", "a", None, "b"]
    outputs = engine.generate(prompts, params, adapters)
    assert [len(output.token_ids) for output in outputs] == [9, 1, 4, 7, 2, 6]
    assert [output.adapter for output in outputs] == adapters
    for prompt, one, adapter, output in zip(prompts, params, adapters, outputs, strict=True):
        assert engine.generate([prompt], one, adapter)[0].token_ids == output.token_ids


def test_single_prompt_and_empty_list_are_accepted(engine) -> None:
    assert len(engine.generate([4, 5, 6], SamplingParams(max_tokens=1))) == 1
    assert len(engine.generate("fox", SamplingParams(max_tokens=1))) == 1
    assert engine.generate([]) == []


def test_tokenizer_mappings_and_integer_arrays_are_prompts_row_by_row(engine) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    rows = [[4, 5, 6], [7, 8, 9]]
    expected = [output.token_ids for output in engine.generate(rows, params)]
    padded = {"input_ids": [[0, 4, 5, 6], [7, 8, 9, 0]], "attention_mask": [[0, 1, 1, 1], [1, 1, 1, 0]]}
    for prompts in (
        BatchEncoding({"input_ids": rows}),
        BatchEncoding(padded),
        {"input_ids": np.array(rows)},
        np.array(rows),
        torch.tensor(rows),
        jnp.array(rows),
        [BatchEncoding({"input_ids": rows[0]}), torch.tensor(rows[1])],
        (torch.tensor(rows[0]), {"input_ids": [rows[1]]}),
    ):
        outputs = engine.generate(prompts, params)
        assert [output.token_ids for output in outputs] == expected
        assert [output.prompt_token_ids for output in outputs] == rows
    for prompt in (BatchEncoding({"input_ids": rows[0]}), jnp.array(rows[0]), list(torch.tensor(rows[0]))):
        assert engine.generate(prompt, params)[0].token_ids == expected[0]
        assert [delta.output for delta in engine.stream(prompt, params)][-1].token_ids == expected[0]


NO_PROMPTS = [
    {"prompt": "fox"}, {"input_ids": "fox"}, {"input_ids": [1.5]}, b"fox", {"fox"}, {4, 5}, True, [True], 5, 1.5, None,
    [1.5], np.array([1.5]), np.array(5), np.ones(3, bool), [4, "fox"], ["fox", None], [[[[4]]]], iter(["fox"]),
    object(),
]  # fmt: skip


@pytest.mark.parametrize("prompt", NO_PROMPTS, ids=lambda prompt: type(prompt).__name__)
def test_other_prompt_types_are_refused_with_the_accepted_ones(engine, prompt) -> None:
    for call in (engine.generate, engine.add_request, engine.stream):
        with pytest.raises(RequestError, match="must be a string, a list or an integer array of token ids"):
            call(prompt)


def test_messages_as_a_prompt_are_refused_with_a_hint_at_chat(engine) -> None:
    for call in (engine.generate, engine.add_request):
        with pytest.raises(RequestError, match="for messages use chat"):
            call([{"role": "user", "content": "fox"}])


def test_several_rows_are_refused_as_one_prompt(engine) -> None:
    with pytest.raises(RequestError, match="2 rows of token ids: add them one by one, or use generate"):
        engine.add_request(np.array([[4], [5]]))
    with pytest.raises(RequestError, match="attention_mask has another shape"):
        engine.generate({"input_ids": [[4, 5]], "attention_mask": [[1]]})


def test_chat_answers_one_conversation_or_several_in_the_template(engine, tiny) -> None:
    engine.load_adapter("a", random_adapter(tiny.geometry, 4, seed=1))
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    one, other = [{"role": "user", "content": "fox"}], [{"role": "system", "content": "dog"}]
    texts = ["user: fox\nassistant: ", "system: dog\nassistant: "]
    expected = engine.generate(texts, params, ["a", None])
    outputs = engine.chat([one, other], params, ["a", None])
    assert [o.prompt_token_ids for o in outputs] == [o.prompt_token_ids for o in expected]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert engine.chat(one, params, "a")[0].token_ids == expected[0].token_ids
    assert engine.chat([], params) == []
    for messages in ("fox", None, ["fox"], [[]], [[{"role": "user"}, 3]]):
        with pytest.raises(RequestError, match="messages"):
            engine.chat(messages)


@pytest.mark.parametrize("field", ["params", "adapters"])
def test_list_of_the_wrong_length_is_refused_by_name(engine, field) -> None:
    value = {"params": [SamplingParams()] * 2, "adapters": [None] * 2}[field]
    with pytest.raises(RequestError, match=f"{field}: 2 given for 3 prompts"):
        engine.generate(["a", "b", "c"], **{field: value})


# Refusals


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], None, "no tokens"),
        ([5, 320], None, "token id 320 .* vocabulary of 320"),
        ([-1], None, "token id -1"),
        ([5] * 96, None, "96 tokens; with max_model_len=96 at most 95"),
    ],
)
def test_request_that_can_never_run_is_refused(engine, prompt, params, message) -> None:
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, params)


def test_refusal_shows_the_arithmetic_of_pages(engine, tiny, monkeypatch) -> None:
    info = engine.load_adapter("big", random_adapter(tiny.geometry, 16, seed=3))
    monkeypatch.setattr(type(engine.allocator), "capacity", info.num_pages + 11)
    engine.cancel(engine.add_request([5] * 40, SamplingParams(max_tokens=49), "big"))
    with pytest.raises(RequestError) as error:
        engine.add_request([5] * 40, SamplingParams(max_tokens=50), "big")
    monkeypatch.undo()
    message = str(error.value)
    for part in ("40 prompt + 50 new - 1", "/ 8 per page = 12 KV", f"plus {info.num_pages} pages", "num_pages"):
        assert part in message, message
    while engine.has_work():
        engine.step()


def test_one_bad_prompt_refuses_the_whole_call(engine) -> None:
    steps = engine.stats().tokens_computed
    with pytest.raises(RequestError):
        engine.generate([[5], [6], [999]])
    assert engine.stats().tokens_computed == steps


def test_unknown_adapter_is_refused_with_the_nearest_names(engine, tiny) -> None:
    engine.load_adapter("french", random_adapter(tiny.geometry, 2))
    with pytest.raises(AdapterError, match=r"unknown adapter 'frnch'.*'french'"):
        engine.add_request([5], adapter="frnch")
    with pytest.raises(AdapterError, match="unknown adapter"):
        engine.unload_adapter("frnch")


def test_adapter_above_max_rank_is_refused_on_load_and_changes_nothing(engine, tiny) -> None:
    engine.load_adapter("a", random_adapter(tiny.geometry, 2))
    before = engine.adapters()
    for name in ("a", "b"):
        with pytest.raises(AdapterError, match="rank 17 but max_lora_rank is 16"):
            engine.load_adapter(name, random_adapter(tiny.geometry, {"q": 17}))
    assert engine.adapters() == before


def test_adapter_that_names_another_base_model_warns(engine, tiny, model_dir, tmp_path) -> None:
    adapter = random_adapter(tiny.geometry, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for base in (str(model_dir), f"unsloth/{model_dir.name}-bnb-4bit", "somebody/another-model"):
            engine.load_adapter("a", write_peft(tmp_path, adapter, base_model_name_or_path=base))
    quantised, other = (str(warning.message) for warning in caught)
    assert "-bnb-4bit' is another quantisation of the base model, whose weights are float32 here" in quantised
    assert f"'somebody/another-model' is another name than that of the base model, {model_dir.name}" in other


def test_request_id_in_use_is_refused_and_free_again_afterwards(engine) -> None:
    assert engine.add_request([5], SamplingParams(max_tokens=1), request_id="mine") == "mine"
    with pytest.raises(RequestError, match="'mine' is in use"):
        engine.add_request([5], request_id="mine")
    with pytest.raises(RequestError, match="unfinished"):
        engine.generate([[5]])
    while engine.has_work():
        engine.step()
    engine.add_request([5], SamplingParams(max_tokens=1), request_id="mine")
    while engine.has_work():
        engine.step()


def test_generate_names_what_is_unfinished_and_how_to_end_it(engine) -> None:
    stream = engine.stream(PROMPT, LONG)
    next(stream)
    with pytest.raises(RequestError, match=r"request-\d+ unfinished: first run an open stream to its end or close"):
        engine.generate(PROMPT)
    stream.close()
    assert len(engine.generate(PROMPT, SamplingParams(max_tokens=1))) == 1


def test_arguments_of_a_wrong_type_are_refused_by_name(engine) -> None:
    for call in (
        lambda: engine.generate("fox", {"max_tokens": 3}),
        lambda: engine.add_request("fox", {"max_tokens": 3}),
    ):
        with pytest.raises(RequestError, match=r"params=\{'max_tokens': 3\}: .*write SamplingParams\(\*\*params\)"):
            call()
    with pytest.raises(RequestError, match=r"params\[1\]=3: must be None or of type SamplingParams"):
        engine.generate(["fox", "dog"], [None, 3])
    with pytest.raises(RequestError, match=r"adapters=3: must be None or of type str"):
        engine.generate("fox", None, 3)
    with pytest.raises(RequestError, match=r"adapter=3: must be None or of type str"):
        engine.add_request("fox", None, 3)
    with pytest.raises(ConfigError, match=r"config=\{'max_num_seqs': 3\}: must be an EngineConfig; write"):
        Engine.from_pretrained("nowhere", {"max_num_seqs": 3})


@pytest.mark.parametrize("name", [3, None, "", ["a"]])
def test_adapter_names_other_than_strings_are_refused(engine, tiny, name) -> None:
    with pytest.raises(AdapterError, match="name=.*: must be a string, and not empty"):
        engine.load_adapter(name, random_adapter(tiny.geometry, 2))
    with pytest.raises(AdapterError, match="name=.*: must be a string, and not empty"):
        engine.unload_adapter(name)
    with pytest.raises(AdapterError, match="adapter=3: must be a PEFT directory or a LoraAdapter"):
        engine.load_adapter("a", 3)


def test_ids_given_by_the_caller_never_collide_with_the_engines_own(engine) -> None:
    first = engine.add_request([5], SamplingParams(max_tokens=1))
    number = int(first.split("-")[-1])
    taken = [engine.add_request([5], SamplingParams(max_tokens=1), request_id=f"request-{number + 2}")]
    taken += [engine.add_request([5], SamplingParams(max_tokens=1)) for _ in range(2)]
    assert len({first, *taken}) == 4
    while engine.has_work():
        engine.step()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float16"),
        ("page_size", 12),
        ("max_num_seqs", 0),
        ("num_pages", 1),
        ("max_lora_rank", 257),
        ("gpu_memory_utilization", 0.0),
        ("max_num_batched_tokens", 3),
        ("seed", -1),
        ("decode_buckets", (2,)),
        ("mixed_buckets", ()),
        ("mixed_buckets", 16),
        ("progress", "no"),
        ("spill_dir", 3),
        ("adapter_slots", 0),
        ("host_adapter_bytes", 0),
        ("prefetch", -1),
        ("prefetch", 1.5),
        ("upload_pages_per_step", 0),
        ("prefix_cache", "yes"),
        ("admission", "eager"),
        ("lora", "unmerged"),
    ],
)
def test_bad_setting_is_refused_with_field_and_value(field, value) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, field: value})
    assert f"EngineConfig.{field}={value!r}" in str(error.value)


def test_automatic_dtype_is_float32_on_a_cpu(tiny) -> None:
    assert EngineConfig().dtype == "auto" and EngineConfig(dtype="bfloat16").with_dtype().dtype == "bfloat16"
    with tiny.engine(dtype="auto") as engine:
        assert engine.config.dtype == "float32" and engine.store.dtype == np.float32


@pytest.mark.parametrize(("former", "now"), [(a, b) for a, b in FORMER_NAMES.items() if hasattr(EngineConfig, b)])
def test_former_name_of_a_setting_is_refused_with_its_name_now(former, now) -> None:
    with pytest.raises(ConfigError, match=f"EngineConfig.{former} is called {now} now"):
        EngineConfig(**{former: 8})


def test_unknown_setting_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"EngineConfig\.max_seq is unknown \(did you mean 'max_num_seqs'\?\)"):
        EngineConfig(max_seq=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_of_a_few_rows_serve(tiny, rows) -> None:
    settings = {"max_num_seqs": 1, "max_num_batched_tokens": rows, "decode_buckets": None, "mixed_buckets": None}
    with tiny.engine(**settings, lora="off", compile_ahead=False) as engine:
        assert len(engine.generate([[4, 5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_longer_than_the_model_is_refused(tiny) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len=129.*128 positions"):
        tiny.engine(max_model_len=129)


# Statistics


def test_statistics_count_tokens_loads_and_hits(engine, tiny) -> None:
    engine.load_adapter("a", random_adapter(tiny.geometry, 4, seed=1))
    before = engine.stats()
    outputs = engine.generate([[5] * 20, [6] * 3], SamplingParams(max_tokens=4, ignore_eos=True), ["a", "a"])
    after = engine.stats()
    assert after.tokens_generated - before.tokens_generated == 8
    assert after.tokens_computed - before.tokens_computed == 20 + 3 + 3 + 3  # a request's last token is never computed
    assert after.adapter_loads - before.adapter_loads == 1 and after.adapter_hits - before.adapter_hits == 1
    assert after.registered_adapters == 1 and after.resident_adapters == 1
    assert after.pages.total == engine.allocator.capacity
    for output in outputs:
        metrics = output.metrics
        assert metrics.arrival <= metrics.admitted <= metrics.first_token <= metrics.finished
        assert 0 < metrics.first_token_latency <= metrics.latency
