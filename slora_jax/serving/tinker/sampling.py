"""Samples in Tinker's form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np

from slora_jax.engine import RequestOutput
from slora_jax.engine.outputs import TokenLogprobs
from slora_jax.metrics import FinishReason
from slora_jax.serving.http.access import Client
from slora_jax.serving.http.generation import outputs_of
from slora_jax.serving.mailbox import Mailbox
from slora_jax.serving.service import Service
from slora_jax.serving.tinker.bodies import SampleBody
from slora_jax.serving.tinker.messages import LENGTH, STOP, SampleResponse

NO_TOKEN, NO_LOGPROB = 0, -99999.0
"""What fills a row of top tokens that has fewer, or none."""


async def sample(
    service: Service, client: Client, body: SampleBody, prompt: list[int], adapter: str | None, held: AsyncExitStack
) -> bytes:
    """Generates the samples, and returns a `SampleResponse`. Releases `held` at the end.

    Args:
      prompt: token ids, checked.
      adapter: None for the base model.
    """
    async with held:
        mailbox, room = Mailbox(), service.loop.engine.max_model_len - len(prompt)
        tenant = client.name if service.settings.tenants == "client" else ""
        ids = [
            service.loop.submit(prompt, body.sampling(index, room), adapter, tenant, mailbox, index)
            for index in range(body.num_samples)
        ]
        held.callback(service.loop.cancel, ids)
        return _encode(body, await outputs_of(mailbox, body.num_samples))


def _encode(body: SampleBody, outputs: Sequence[RequestOutput]) -> bytes:
    response = SampleResponse(prompt_cache_hit_tokens=outputs[0].metrics.cached_tokens)
    for output in outputs:
        assert output.logprobs is not None
        sequence = response.sequences.add(
            stop_reason=LENGTH if output.finish_reason is FinishReason.LENGTH else STOP,
            tokens=np.asarray(output.token_ids, "<i4").tobytes(),
            logprobs=_logprobs(output.logprobs),
        )
        if body.topk_sample_logprobs:
            _write_top(sequence.topk_sampled_logprobs, output.logprobs, body.topk_sample_logprobs)
    if outputs[0].prompt_logprobs is not None:
        scored = body.scored(len(outputs[0].prompt_logprobs))
        of_prompt = [
            one if is_scored else None for one, is_scored in zip(outputs[0].prompt_logprobs, scored, strict=True)
        ]
        if body.prompt_logprobs:
            response.prompt_logprobs = _logprobs(of_prompt)
        if body.topk_prompt_logprobs:
            _write_top(response.topk_prompt_logprobs, of_prompt, body.topk_prompt_logprobs)
    return response.SerializeToString()


def _logprobs(values: Sequence[TokenLogprobs | None]) -> bytes:
    """Encodes the tokens' own log-probabilities; NaN where there is none."""
    return np.asarray([np.nan if one is None else one.logprob for one in values], "<f4").tobytes()


def _write_top(message: Any, values: Sequence[TokenLogprobs | None], k: int) -> None:
    """Writes the top tokens of each position, `[len(values), k]`."""
    tokens, logprobs = np.full((len(values), k), NO_TOKEN, "<i4"), np.full((len(values), k), NO_LOGPROB, "<f4")
    for row, one in enumerate(values):
        for column, (token, logprob) in enumerate(() if one is None else one.top[:k]):
            tokens[row, column], logprobs[row, column] = token, logprob
    message.token_ids, message.logprobs = tokens.tobytes(), logprobs.tobytes()
    message.k, message.length = k, len(values)
