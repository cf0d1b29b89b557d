"""Validation of arriving requests, so that no step can fail on a request's input."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from slora_jax.adapters import AdapterInfo
from slora_jax.engine.config import EngineConfig
from slora_jax.engine.outputs import Prompt
from slora_jax.errors import ConfigError, RequestError
from slora_jax.memory import PageAllocator, PageKind
from slora_jax.scheduling import AdapterUse, Policy, SamplingParams


def prompt_ids(prompt: Prompt, tokenizer: Any, vocab_size: int, max_model_len: int) -> list[int]:
    """Returns the prompt's token ids.

    Raises:
      RequestError: the prompt has another type, is empty, is a string without a tokenizer or with half a surrogate
        pair, has ids outside the vocabulary, or leaves no room for an answer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("the prompt is a string, but the model directory has no tokenizer: pass token ids")
        ids = text_ids(prompt, tokenizer, max_model_len)
    else:
        rows = _rows(prompt, prompt)
        if len(rows) != 1:
            raise RequestError(f"the prompt has {len(rows)} rows of token ids: add them one by one, or use generate")
        ids = rows[0]
    if not ids:
        raise RequestError("the prompt has no tokens")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(f"token id {wrong} in the prompt is outside the vocabulary of {vocab_size}")
    if len(ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(ids)} tokens; with max_model_len={max_model_len} at most {max_model_len - 1} leave "
            "room for an answer"
        )
    return ids


def text_ids(text: str, tokenizer: Any, max_model_len: int, **options: Any) -> list[int]:
    """Returns a text's token ids.

    A long text is rejected after tokenizing only its beginning, because tokenizing megabytes would take seconds and
    hundreds of times the text's memory.

    Args:
      options: keyword arguments of the tokenizer.

    Raises:
      RequestError: the text has half a surrogate pair, or its beginning alone exceeds `2 * max_model_len` tokens.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode: {error.reason}, at character {error.start}") from None
    beginning = text[: 8 * max_model_len]
    if len(beginning) < len(text):
        count = len(tokenizer(beginning, **options)["input_ids"])
        if count > 2 * max_model_len:
            raise RequestError(
                f"the prompt has {len(text)} characters, and its first {len(beginning)} are {count} tokens; with "
                f"max_model_len={max_model_len} at most {max_model_len - 1} leave room for an answer"
            )
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


def check_embedding(params: SamplingParams, config: EngineConfig) -> None:
    """Raises ConfigError if an embedding is requested, but the engine has no programs for it."""
    if params.prompt_embedding is not None and not config.embeddings:
        raise ConfigError(
            f"SamplingParams.prompt_embedding={params.prompt_embedding!r}: must be None, because the engine was made "
            "without EngineConfig.embeddings"
        )


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raises ConfigError if a token of `logit_bias` is outside the vocabulary."""
    for token, _ in cast(tuple[tuple[int, float], ...], params.logit_bias):  # `SamplingParams` has converted it
        if token >= vocab_size:
            raise ConfigError(f"SamplingParams.logit_bias={token}: the token must be in [0, {vocab_size - 1}]")


def check_priority(priority: int, policy: Policy) -> None:
    """Raises ConfigError if the policy would ignore the priority."""
    if priority and not policy.takes_priority:
        raise ConfigError(
            f"priority={priority}: must be 0, because the policy {type(policy).__name__} takes no priority; leave it "
            "out, or serve with the policy 'priority'"
        )


def check_fits(prompt: int, new: int, page_size: int, adapter: AdapterUse | None, allocator: PageAllocator) -> None:
    """Checks that a request could run alone in the pool.

    Args:
      prompt: number of prompt tokens.
      new: maximum number of generated tokens.

    Raises:
      RequestError: it does not fit; the message shows the arithmetic.
    """
    kv_pages = -(-(prompt + new - 1) // page_size)  # the last token needs no KV
    need = f"({prompt} prompt + {new} new - 1) tokens / {page_size} per page = {kv_pages} KV pages"
    if allocator.adapter_pages is None:
        adapter_pages = 0 if adapter is None else adapter.num_pages
        if kv_pages + adapter_pages > allocator.capacity:
            raise RequestError(
                f"the request can never fit: {need}, plus {adapter_pages} pages of the adapter, is more than the "
                f"pool's {allocator.capacity}; lower max_tokens or raise num_pages"
            )
    elif kv_pages > allocator.capacity_for(PageKind.KV):
        raise RequestError(
            f"the request can never fit: {need} is more than the {allocator.capacity_for(PageKind.KV)} that "
            f"adapter_pages={allocator.adapter_pages} leaves of the pool; lower max_tokens or raise num_pages"
        )


def most_tokens(page_size: int, adapter: AdapterUse | None, allocator: PageAllocator) -> int:
    """Returns the maximum number of tokens, prompt and output, of a request that runs alone in the pool."""
    pages = allocator.capacity_for(PageKind.KV)
    if allocator.adapter_pages is None and adapter is not None:
        pages = allocator.capacity - adapter.num_pages
    return pages * page_size + 1  # the last token needs no KV


def each_prompt(prompts: Any) -> list[Any]:
    """Returns a list of prompts: one prompt, the rows of an array or of a mapping's `input_ids`, or a list's items.

    The items are validated later, by `prompt_ids`.

    Raises:
      RequestError: `prompts` is neither a prompt nor a list.
    """
    prompts = _plain(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return _rows(prompts, prompts)
    if not _is_list(prompts):
        raise _no_prompt(prompts)
    items = [_plain(item) for item in prompts]
    return [items] if items and all(map(_is_token, items)) else items


def each_conversation(messages: Any) -> list[Any]:
    """Returns a list of conversations: a single one, or a list's items. `chat_ids` validates each."""
    is_one = not _is_list(messages) or any(isinstance(one, Mapping) for one in messages)
    return [messages] if is_one else list(messages)


def chat_ids(messages: Any, tokenizer: Any, max_model_len: int, **variables: Any) -> list[int]:
    """Returns the token ids of a conversation in the model's chat template, up to the start of the answer.

    Args:
      messages: mappings with "role" and "content".
      variables: variables of the template.

    Raises:
      RequestError: `messages` has another form, or there is no template, or the template rejects the messages.
    """
    if not (_is_list(messages) and all(isinstance(one, Mapping) and "role" in one for one in messages)):
        raise RequestError(f"messages={reprlib.repr(messages)}: must be a list of mappings with role and content")
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise RequestError("the model has no chat template: give prompts as text or token ids instead")
    options = {"add_generation_prompt": True} | variables
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        raise RequestError(f"the model's chat template rejects the messages: {error}") from error
    return text_ids(text, tokenizer, max_model_len, add_special_tokens=False)  # the template has added them


def require_kind(field: str, value: Any, kind: type) -> None:
    """Raises RequestError unless `value` is None or an instance of `kind`."""
    if value is not None and not isinstance(value, kind):
        remedy = f"; write {kind.__name__}(**{field})" if isinstance(value, Mapping) else ""
        raise RequestError(f"{field}={reprlib.repr(value)}: must be None or of type {kind.__name__}{remedy}")


def one_each(field: str, value: Any, kind: type, count: int) -> Sequence[Any]:
    """Returns `count` values: `value` repeated if it is a single one (or None), or its items if it is a list.

    Raises:
      RequestError: the list has another length, or a value another type.
    """
    value = _plain(value)
    if value is None or isinstance(value, kind) or not _is_list(value):
        require_kind(field, value, kind)
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{field}: {len(value)} given for {count} prompts; pass one for all, or one each")
    for number, one in enumerate(value):
        require_kind(f"{field}[{number}]", one, kind)
    return list(value)


def _rows(given: Any, whole: Any) -> list[list[int]]:
    """Returns rows of token ids: one for a flat list or array, several for a nested one.

    A mapping contributes its `input_ids`, without the tokens masked by its `attention_mask`.

    Args:
      whole: the caller's value, for the error message.
    """
    if type(given) is list and all(type(token) is int for token in given):
        return [given[:]]
    given = _plain(given)
    if isinstance(given, Mapping) and "input_ids" in given:
        rows, mask = _rows(given["input_ids"], whole), given.get("attention_mask")
        if mask is None:
            return rows
        masks = _rows(mask, whole)
        if [len(row) for row in rows] != [len(row) for row in masks]:
            raise RequestError("the prompt's attention_mask has another shape than its input_ids")
        return [
            [token for token, is_kept in zip(row, row_mask, strict=True) if is_kept]
            for row, row_mask in zip(rows, masks, strict=True)
        ]
    if not _is_list(given):
        raise _no_prompt(whole)
    items = [_plain(item) for item in given]
    if all(map(_is_token, items)):
        return [[int(token) for token in items]]
    if not all(_is_list(item) and all(map(_is_token, item)) for item in items):
        raise _no_prompt(whole)
    return [[int(token) for token in item] for item in items]


def _plain(value: Any) -> Any:
    """Converts arrays and array scalars (NumPy, torch, JAX) to lists and numbers; returns other values unchanged."""
    if isinstance(value, (int, str, list)) or not (hasattr(value, "shape") and hasattr(value, "tolist")):
        return value
    return value.tolist()


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _is_token(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _no_prompt(given: Any) -> RequestError:
    messages = given if _is_list(given) else [given]
    is_chat = any(isinstance(one, Mapping) and "role" in one for one in messages)
    return RequestError(
        f"prompt={reprlib.repr(given)}: must be a string, a list or an integer array of token ids, or a mapping with "
        f"input_ids, as a tokenizer returns{'; for messages use chat' if is_chat else ''}"
    )


def activation(prompt: Sequence[int], adapter: AdapterInfo) -> int:
    """Returns the position of the first prompt token that the adapter acts on.

    It is 0, except for an activated LoRA, which acts from the last occurrence of its invocation tokens on.

    Raises:
      RequestError: the prompt lacks the invocation tokens, so the adapter would never act.
    """
    invocation = list(adapter.invocation)
    for start in range(len(prompt) - len(invocation), -1, -1) if invocation else ():
        if list(prompt[start : start + len(invocation)]) == invocation:
            return start
    if invocation:
        raise RequestError(
            f"adapter={adapter.name!r}: acts from its invocation tokens {invocation} on, which the prompt of "
            f"{len(prompt)} tokens lacks; add them, or use the base model"
        )
    return 0
