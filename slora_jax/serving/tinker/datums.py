"""Examples of a forward or forward_backward request, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from slora_jax.errors import RequestError
from slora_jax.serving.tinker.messages import FLOAT32, INT64, ForwardBackwardOutput
from slora_jax.training import LOSSES, Example, Loss
from slora_jax.training.losses import cispo, ppo

TARGETS, WEIGHTS, LOW, HIGH = "target_tokens", "weights", "clip_low_threshold", "clip_high_threshold"
CLIPPING = {LOW: 0.8, HIGH: 1.2}
"""Settings of the clipped losses, with their defaults. An example may give one for each token instead."""


def clipped_ppo(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """`ppo` with thresholds as data, so that other thresholds compile nothing."""
    return ppo(logprobs, inputs, inputs[LOW], inputs[HIGH])  # type: ignore[arg-type]


def clipped_cispo(logprobs: jax.Array, inputs: Mapping[str, jax.Array]) -> jax.Array:
    """`cispo` with thresholds as data."""
    return cispo(logprobs, inputs, inputs[LOW], inputs[HIGH])  # type: ignore[arg-type]


CLIPPED: dict[str, Loss] = {"ppo": clipped_ppo, "cispo": clipped_cispo}


@dataclass(frozen=True)
class Limits:
    """Limits of an example. longest: most tokens."""

    vocab_size: int
    longest: int


def read_pass(request: Any, limits: Limits) -> tuple[list[Example], str | Loss]:
    """Reads a `ForwardBackwardRequest`: its examples and its loss, as the trainer takes them.

    All examples are checked, so that none of them is trained if one is wrong.

    Raises:
      RequestError: names the example, the field, the value and the allowed values.
    """
    name = request.loss_fn
    if name not in LOSSES:
        raise RequestError(f"loss_fn={name!r}: must be one of {', '.join(LOSSES)}")
    settings = dict(CLIPPING) if name in CLIPPED else {}
    for given in request.loss_fn_config_v2:
        if given.key not in settings:
            raise RequestError(
                f"loss_fn_config.{given.key}: the loss {name} takes {', '.join(settings) or 'no settings'}"
            )
        if given.value.text:
            raise RequestError(f"loss_fn_config.{given.key}={given.value.text!r}: must be a number")
        settings[given.key] = given.value.number
    if not request.data:
        raise RequestError("data: must not be empty")
    examples = []
    for index, datum in enumerate(request.data):
        try:
            examples.append(_example(datum, name, settings, limits))
        except RequestError as error:
            raise RequestError(f"data[{index}].{error}") from None
    return examples, CLIPPED.get(name, name)


def encode_result(loss: float, logprobs: Sequence[np.ndarray]) -> bytes:
    """Encodes the result of a pass.

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


def _example(datum: Any, loss: str, settings: Mapping[str, float], limits: Limits) -> Example:
    if datum.model_input_spans or datum.loss_fn_input_spans:
        raise RequestError("model_input_spans: provenance is not supported; leave it out")
    tokens = _tokens(datum.model_input)
    needed = LOSSES[loss][1]
    given = {}
    for one in datum.loss_fn_inputs:
        if one.key not in (TARGETS, WEIGHTS, *needed, *settings):
            allowed = ", ".join((TARGETS, WEIGHTS, *needed, *settings))
            raise RequestError(f"loss_fn_inputs.{one.key}: the loss {loss} takes {allowed}; leave it out")
        given[one.key] = _array(one.value, one.key)
    if TARGETS not in given:
        raise RequestError(f"loss_fn_inputs: the loss needs {TARGETS!r}")
    ones = np.ones(len(tokens), np.float32)
    inputs = {name: value * ones for name, value in settings.items()} | given
    targets, weights = inputs.pop(TARGETS), inputs.pop(WEIGHTS, ones)
    example = Example(tokens, targets, weights, inputs)
    example.check(limits.vocab_size, limits.longest, needed)
    return example


def _tokens(chunks: Sequence[Any]) -> np.ndarray:
    """Returns int32 token ids `[n]`."""
    for chunk in chunks:
        if not chunk.HasField("encoded_text"):
            raise RequestError("model_input: must be token ids; images and audio are not supported")
    return _values(b"".join(chunk.encoded_text.tokens for chunk in chunks), "<i4", "model_input")


def _array(tensor: Any, name: str) -> np.ndarray:
    """Returns a dense tensor: int64 for token ids, else float32."""
    where, (kind, dtype, number) = f"loss_fn_inputs.{name}", _KINDS[name == TARGETS]
    if tensor.HasField("sparse_csr") or len(tensor.shape) > 1:
        raise RequestError(f"{where}: must have one dimension, a value for each token")
    if tensor.dtype != number:
        raise RequestError(f"{where}: must be {kind}")
    return _values(tensor.dense, dtype, where)


_KINDS = {True: ("int64", "<i8", INT64), False: ("float32", "<f4", FLOAT32)}


def _values(data: bytes, dtype: str, where: str) -> np.ndarray:
    if len(data) % np.dtype(dtype).itemsize:
        raise RequestError(f"{where}: {len(data)} bytes are not a whole number of values of type {dtype}")
    return np.frombuffer(data, dtype)
