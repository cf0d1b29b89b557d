"""The tokenizer agrees with transformers' fast tokenizer: ids, text, chat templates, published files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from byte_level import SENTENCES, VOCAB_SIZE, train_tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from slora_jax.engine.text import load_tokenizer
from slora_jax.engine.tokenizer import Tokenizer
from slora_jax.errors import CheckpointError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = """{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set date_string = strftime_now("%d %b %Y") %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
WITH_DOCUMENTS = """
{% if documents is none and tools is none %}
none
{% endif %}
    {% for one in documents or [] %}
        {% if loop.index > 1 %}
            {% break %}
        {% endif %}
{{ one.title }}: {{ one | tojson }}
    {% endfor %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content }}{{ eos_token }}
        {% endgeneration %}
    {% else %}
{{ message.content | tojson }} {{ style }}
    {% endif %}
{% endfor %}
"""
TEMPLATES = {"ChatML": CHATML, "Llama 3": LLAMA_3, "Mistral": MISTRAL, "documents": WITH_DOCUMENTS}
CHAT = [
    {"role": "user", "content": "Is 1 < 2 & 'é' > \"猫\"?"},
    {"role": "assistant", "content": " It is. "},
    {"role": "user", "content": "Why?"},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "<str>"}}}
TEXTS = [
    *SENTENCES,
    "",
    " leading and trailing ",
    "<s>the</s> fox<|im_end|>",
    "naïve 猫🙂\n\ttabs",
    "don 't stop , now .",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def surround(backend: Backend) -> Backend:
    """Makes the post-processor add <s> before a text."""
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def word_pieces() -> Backend:
    words = ["[UNK]", "do", "n", "##t", "'", "t", "s", "stop", ",", "now", ".", "?", "!", "<s>", "</s>"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


def write(directory: Path, backend: Backend, config: dict | None = None, **files: object) -> Path:
    """A model directory. files: by name without its extension, JSON."""
    backend.save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config": config, **files}.items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def assert_same(tokenizer: Tokenizer, reference: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        for add in (True, False):
            ids = tokenizer(text, add_special_tokens=add)["input_ids"]
            assert ids == reference(text, add_special_tokens=add)["input_ids"]
            for skip in (True, False):
                decoded = tokenizer.decode(ids, skip_special_tokens=skip)
                assert decoded == reference.decode(ids, skip_special_tokens=skip)
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(tokenizer, f"{name}_token") == getattr(reference, f"{name}_token")
        assert getattr(tokenizer, f"{name}_token_id") == getattr(reference, f"{name}_token_id")


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", None])
def test_tokenizer_file_decides_not_the_named_class(tmp_path, tokenizer_class):
    config = SPECIAL | {"tokenizer_class": tokenizer_class, "add_bos_token": False, "add_eos_token": True}
    write(tmp_path, surround(train_tokenizer()), config)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, Tokenizer)
    assert_same(tokenizer, PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **SPECIAL))
    assert_same(tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert tokenizer("the fox")["input_ids"][0] == tokenizer.bos_token_id


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    backend = train_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=10, pad_id=0)
    tokenizer = Tokenizer.from_directory(write(tmp_path, backend))
    long, short = "the quick brown fox " * 9, "the"
    whole = train_tokenizer()
    assert tokenizer(long)["input_ids"] == whole.encode(long).ids
    assert tokenizer(short)["input_ids"] == whole.encode(short).ids


def test_special_tokens_of_the_vocabulary_are_recognized_in_text(tmp_path):
    """Some fine-tunes' tokenizer.json lists no added tokens, while their chat template writes an end of turn."""
    content = json.loads(train_tokenizer().to_str())
    content["added_tokens"] = []
    declared = {str(train_tokenizer().token_to_id("</s>")): {"content": "</s>", "special": True, "normalized": False}}
    for config in (
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "added_tokens_decoder": declared},
        {"bos_token": "<s>", "additional_special_tokens": ["</s>"]},
    ):
        write(tmp_path, Backend.from_str(json.dumps(content)), config)
        tokenizer, reference = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert_same(tokenizer, reference)
        assert len(tokenizer("<s></s>")["input_ids"]) == 2


def test_a_special_token_outside_the_vocabulary_gets_no_id(tmp_path):
    tokenizer = Tokenizer.from_directory(write(tmp_path, train_tokenizer(), {"pad_token": "[PAD]"}))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", None)
    assert max(tokenizer("[PAD]")["input_ids"]) < VOCAB_SIZE


def test_special_tokens_map_is_read_for_directories_of_old(tmp_path):
    write(tmp_path, train_tokenizer(), {"eos_token": "fox"}, special_tokens_map=SPECIAL | {"pad_token": "</s>"})
    tokenizer, reference = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.special_tokens_map == reference.special_tokens_map == SPECIAL | {"pad_token": "</s>"}


@pytest.mark.parametrize("clean_up", [True, False, None])
@pytest.mark.parametrize("backend", [train_tokenizer, word_pieces])
def test_spaces_are_cleaned_up_where_transformers_does(tmp_path, backend, clean_up):
    write(tmp_path, backend(), SPECIAL | {"clean_up_tokenization_spaces": clean_up})
    assert_same(load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_special_tokens_are_split_if_the_config_says_so(tmp_path):
    write(tmp_path, train_tokenizer(), SPECIAL | {"split_special_tokens": True})
    assert_same(load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"tools": [TOOL]}, {"documents": [{"title": "é", "text": "<b>"}] * 2}])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_in_transformers(tmp_path, name, variables, add_generation_prompt):
    write(tmp_path, train_tokenizer(), SPECIAL | {"chat_template": TEMPLATES[name]})
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "style": "plain", **variables}
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(CHAT, **options)
    assert load_tokenizer(tmp_path).apply_chat_template(CHAT, **options) == expected


def test_a_template_refuses_roles_that_do_not_alternate():
    tokenizer = Tokenizer(train_tokenizer(), chat_template=MISTRAL, special_tokens=SPECIAL)
    with pytest.raises(Exception, match="roles must alternate"):
        tokenizer.apply_chat_template(CHAT[1:])
    with pytest.raises(ValueError, match="at least one message"):
        tokenizer.apply_chat_template([])


def test_a_template_runs_in_a_sandbox():
    tokenizer = Tokenizer(train_tokenizer(), chat_template="{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(Exception, match=r"unsafe|not safely callable"):
        tokenizer.apply_chat_template(CHAT)


def test_named_templates_are_chosen_as_in_transformers(tmp_path):
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": LLAMA_3}]
    write(tmp_path, train_tokenizer(), SPECIAL | {"chat_template": named})
    tokenizer, reference = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for options in ({}, {"tools": [TOOL]}, {"tools": []}, {"chat_template": "tool_use"}, {"chat_template": MISTRAL}):
        expected = reference.apply_chat_template(CHAT, tokenize=False, **options)
        assert tokenizer.apply_chat_template(CHAT, tokenize=False, **options) == expected


def test_template_files_come_before_the_config(tmp_path):
    write(tmp_path, train_tokenizer(), SPECIAL | {"chat_template": CHATML})
    (tmp_path / "chat_template.jinja").write_text(MISTRAL)
    assert load_tokenizer(tmp_path).chat_template == MISTRAL
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(LLAMA_3)
    assert load_tokenizer(tmp_path).chat_template == {"default": MISTRAL, "tool_use": LLAMA_3}
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == load_tokenizer(tmp_path).chat_template


def test_tokenizer_is_made_of_its_parts():
    tokenizer = Tokenizer(train_tokenizer(), chat_template=LLAMA_3, special_tokens=SPECIAL)
    reference = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), chat_template=LLAMA_3, **SPECIAL)
    assert_same(tokenizer, reference)
    assert tokenizer.apply_chat_template(CHAT) == reference.apply_chat_template(CHAT, tokenize=False)
    assert Tokenizer(train_tokenizer()).chat_template is None


def test_old_tokenizer_files_are_loaded_by_transformers_with_a_warning(tmp_path, caplog):
    content = json.loads(train_tokenizer().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = SPECIAL | {"unk_token": "<s>", "tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = load_tokenizer(tmp_path)
    assert "has no tokenizer.json" in caplog.text
    assert tokenizer.decode(tokenizer("the quick fox")["input_ids"]) == "the quick fox"


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config"])
def test_damaged_files_are_named(tmp_path, name):
    write(tmp_path, train_tokenizer(), {})
    (tmp_path / f"{name}.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"{name}.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_the_engine_imports_neither_transformers_nor_orbax():
    program = "import sys, slora_jax.engine.engine; print([*sys.modules.keys() & {'transformers', 'torch', 'orbax'}])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout == "[]\n"


def test_added_tokens_keep_their_flags(tmp_path):
    backend = train_tokenizer()
    backend.add_tokens([AddedToken("<think>", lstrip=True, normalized=False)])
    write(tmp_path, backend, SPECIAL)
    tokenizer = load_tokenizer(tmp_path)
    assert_same(tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert tokenizer.decode(tokenizer("the <think>fox")["input_ids"]) == "the<think>fox"
