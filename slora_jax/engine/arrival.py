"""What is checked when a request arrives, so that nothing that runs can fail on its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slora_jax.engine.outputs import Prompt
from slora_jax.errors import RequestError
from slora_jax.memory import PageAllocator, PageKind
from slora_jax.scheduling import AdapterUse


def prompt_ids(prompt: Prompt, tokenizer: Any, vocab_size: int, max_model_len: int) -> list[int]:
    """The prompt's token ids.

    Raises:
      RequestError: no tokens, a string without a tokenizer or with half a surrogate pair, ids that are none or outside
        the vocabulary, no room left for an answer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("the prompt is a string, but the model directory has no tokenizer: pass token ids")
        ids = text_ids(prompt, tokenizer, max_model_len)
    elif is_ids(prompt) or not len(prompt):
        ids = [int(token) for token in prompt]
    else:
        raise RequestError(f"the prompt must be a string or a list of token ids, found {list(prompt)[:3]!r}")
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
    """A text's tokens. options: the tokenizer's.

    Raises:
      RequestError: half a surrogate pair; a beginning that alone has twice the tokens that fit: the tokens of megabytes
        would take seconds, and hundreds of times the text's memory.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is no valid Unicode: {error.reason}, at character {error.start}") from None
    beginning = text[: 8 * max_model_len]
    if len(beginning) < len(text):
        least = len(tokenizer(beginning, **options)["input_ids"])
        if least > 2 * max_model_len:
            raise RequestError(
                f"the prompt has {len(text)} characters, the first {len(beginning)} of which are {least} tokens; with "
                f"max_model_len={max_model_len} at most {max_model_len - 1} leave room for an answer"
            )
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


def check_fits(prompt: int, new: int, page_size: int, adapter: AdapterUse | None, allocator: PageAllocator) -> None:
    """Whether a request of `prompt` and at most `new` tokens could run alone in the pool.

    Raises:
      RequestError: it could not; the message has the arithmetic.
    """
    kv_pages = -(-(prompt + new - 1) // page_size)  # the last token's keys and values are never needed
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
    """Of prompt and output of a request that runs alone in the pool."""
    pages = allocator.capacity_for(PageKind.KV)
    if allocator.adapter_pages is None and adapter is not None:
        pages = allocator.capacity - adapter.num_pages
    return pages * page_size + 1  # the last token's keys and values are never needed


def is_ids(prompts: Any) -> bool:
    """Whether this is one prompt of token ids, rather than several prompts."""
    return len(prompts) > 0 and all(isinstance(token, (int, np.integer)) for token in prompts)


def one_each(field: str, value: Any, kind: type, count: int) -> Sequence[Any]:
    """`value` for each of `count` prompts: one of `kind` (or None) for all, or as many as there are prompts.

    Raises:
      RequestError: there are more or fewer.
    """
    if value is None or isinstance(value, kind):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{field}: {len(value)} given for {count} prompts; pass one for all, or one each")
    return list(value)
