"""Examples of a forward or forward_backward request, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slora_jax.errors import RequestError
from slora_jax.serving.tinker.messages import FLOAT32, INT64, ForwardBackwardOutput
from slora_jax.training import Example

INPUTS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "importance_sampling": ("logprobs", "advantages"),
    "ppo": ("logprobs", "advantages"),
    "cispo": ("logprobs", "advantages"),
}
"""Loss -> inputs that it needs beside `target_tokens`. Each also accepts `weights` (default: 1)."""


def examples_of(request: Any, vocab_size: int, longest: int) -> list[Example]:
    """Reads and checks the examples of a `ForwardBackwardRequest`, so that none of them is trained if one is wrong.

    Args:
      longest: most tokens of an example.

    Raises:
      RequestError: names the example, the field, the value and the allowed values.
    """
    if request.loss_fn not in INPUTS:
        raise RequestError(f"loss_fn={request.loss_fn!r}: must be one of {', '.join(INPUTS)}")
    if not request.data:
        raise RequestError("data: is empty; give at least one example")
    return [
        _example(datum, request.loss_fn, vocab_size, longest, f"data[{index}]")
        for index, datum in enumerate(request.data)
    ]


def output_of(loss: float, logprobs: Sequence[np.ndarray]) -> bytes:
    """Encodes a result.

    Args:
      loss: sum over all tokens.
      logprobs: float32 `[n]` for each example.
    """
    output = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    output.metrics.add(key="loss:sum", value=loss)
    record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(logprobs))
    batch = record.fields.add(key="logprobs").value
    batch.dtype = FLOAT32
    batch.data = b"".join(np.asarray(one, "<f4").tobytes() for one in logprobs)
    batch.offsets = np.cumsum([0, *(4 * len(one) for one in logprobs)], dtype="<i8").tobytes()
    return output.SerializeToString()


def _example(datum: Any, loss: str, vocab_size: int, longest: int, where: str) -> Example:
    if datum.model_input_spans or datum.loss_fn_input_spans:
        raise RequestError(f"{where}.model_input_spans: slora-jax does not support provenance; leave it out")
    tokens = _tokens(datum.model_input, f"{where}.model_input")
    if not 1 <= len(tokens) <= longest:
        raise RequestError(
            f"{where}.model_input has {len(tokens)} tokens: must have 1 to {longest} (the longest of train.lengths)"
        )
    given = {one.key: one.value for one in datum.loss_fn_inputs}
    needed = INPUTS[loss]
    for name in given:
        if name not in ("target_tokens", "weights", *needed):
            allowed = ", ".join(("target_tokens", "weights", *needed))
            raise RequestError(f"{where}.loss_fn_inputs.{name}: the loss {loss} takes {allowed}; leave it out")
    for name in ("target_tokens", *needed):
        if name not in given:
            raise RequestError(f"{where}.loss_fn_inputs.{name} is missing: the loss {loss} needs it")
    arrays = {name: _array(value, name, len(tokens), where) for name, value in given.items()}
    targets = arrays.pop("target_tokens")
    for field, ids in (("model_input", tokens), ("loss_fn_inputs.target_tokens", targets)):
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise RequestError(f"{where}.{field}: token id {wrong[0]} must be in [0, {vocab_size - 1}]")
    weights = arrays.pop("weights", np.ones(len(tokens), np.float32))
    return Example(tokens, targets.astype(np.int32), weights, arrays)


def _tokens(chunks: Sequence[Any], where: str) -> np.ndarray:
    """Returns int32 token ids `[n]`."""
    for chunk in chunks:
        if not chunk.HasField("encoded_text"):
            raise RequestError(f"{where}: only chunks of token ids are supported, no images or audio")
    return np.frombuffer(b"".join(_whole(chunk.encoded_text.tokens, 4, where) for chunk in chunks), "<i4")


def _array(tensor: Any, name: str, length: int, where: str) -> np.ndarray:
    """Returns a dense tensor of `length` values, int64 for token ids and else finite float32."""
    where, is_ids = f"{where}.loss_fn_inputs.{name}", name == "target_tokens"
    if tensor.HasField("sparse_csr") or len(tensor.shape) > 1:
        raise RequestError(f"{where}: must have one value for each token; tensors of two dimensions are not supported")
    if tensor.dtype != (INT64 if is_ids else FLOAT32):
        raise RequestError(f"{where}: must have dtype {'int64' if is_ids else 'float32'}")
    values = np.frombuffer(_whole(tensor.dense, 8 if is_ids else 4, where), "<i8" if is_ids else "<f4")
    if len(values) != length:
        raise RequestError(f"{where} has {len(values)} values: must have {length}, one for each token of model_input")
    if not np.isfinite(values).all():
        raise RequestError(f"{where}: all values must be finite")
    return values


def _whole(data: bytes, size: int, where: str) -> bytes:
    if len(data) % size:
        raise RequestError(f"{where}: {len(data)} bytes are no whole number of {size}-byte values")
    return data


def loss_settings(request: Any) -> Mapping[str, float]:
    """Returns the loss's settings by name. Raises RequestError for a setting that is not a number."""
    for setting in request.loss_fn_config_v2:
        if setting.value.text:
            raise RequestError(f"loss_fn_config.{setting.key}={setting.value.text!r}: must be a number")
    return {setting.key: setting.value for setting in request.loss_fn_config}
