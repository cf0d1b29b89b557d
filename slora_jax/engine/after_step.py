"""Programs that may run after a step, each jitted for a number of sequences: what sampled tokens need beyond the greedy
token that the step itself returns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cutoff import cutoff
from pallas_kernels.lora.layout import ceil_div
from slora_jax.engine.batch import SAMPLER_FIELDS, unpack_sampling, with_cutoff
from slora_jax.engine.sampling import Sampled, edited, sample, score
from slora_jax.engine.step import greedy_token, replicated
from slora_jax.engine.step_spec import StepSpec
from slora_jax.parallel import vocabulary
from slora_jax.parallel.mesh import AXIS, LOGITS, REPLICATED
from slora_jax.scheduling import MAX_LOGIT_BIAS
from slora_jax.scheduling.plan import NOT_FINITE


def make_constrainer(spec: StepSpec, seqs: int) -> Any:
    """Returns the jitted program that runs before the others if a sequence has a grammar or a logit bias.

    `(last_token, token int32 [seqs], logits float32 [seqs, vocab], metadata int32 [9 seqs], *LogitEdits) ->
    (last_token, token, logits)`, as `make_sampler` with the edited logits, of which token is the largest.
    """

    def constrainer(
        last_token: jax.Array,
        token: jax.Array,
        logits: jax.Array,
        metadata: jax.Array,
        allowed: jax.Array,
        bias_token: jax.Array,
        bias: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        slot, _, _ = unpack_sampling(metadata, seqs)
        first = 0 if spec.parallel is None else lax.axis_index(AXIS) * logits.shape[1]
        logits = edited(logits, first, allowed, bias_token, bias)
        token = jnp.where(token == NOT_FINITE, NOT_FINITE, greedy_token(spec, logits))
        return last_token.at[slot].set(token), token, logits

    specs = (REPLICATED, REPLICATED, LOGITS, REPLICATED, REPLICATED, REPLICATED, REPLICATED)
    outputs = (REPLICATED, REPLICATED, LOGITS)
    return _after_step(spec, constrainer, "constrain", seqs, specs, outputs, donated=(0,))


def make_searcher(spec: StepSpec, seqs: int) -> Any:
    """Returns the jitted program that runs before the sampler if a sampled sequence has top-k or top-p.

    `(token int32 [seqs], logits float32 [seqs, vocab], metadata int32 [9 seqs]) -> metadata` with the cutoff set. token
    is the step's.
    """

    def searcher(token: jax.Array, logits: jax.Array, metadata: jax.Array) -> jax.Array:
        _, _, inputs = unpack_sampling(metadata, seqs)
        found = cutoff(
            _whole_logits(spec, logits),
            token,
            inputs.temperature,
            inputs.top_k,
            inputs.top_p,
            implementation="xla" if spec.kernels == "xla" else None,
        )
        return with_cutoff(metadata, found)

    return _after_step(spec, searcher, "cutoff", seqs, (REPLICATED, LOGITS, REPLICATED))


def make_sampler(spec: StepSpec, seqs: int) -> Any:
    """Returns the jitted program that runs after a step with a sampled (not greedy) sequence.

    `(last_token, token int32 [seqs], logits float32 [seqs, vocab], metadata int32 [9 seqs]) -> (last_token, token)`,
    where last_token is that of `SequenceState`, donated, and the token given is the step's. It is separate because, on
    a GPU, a branch inside the step would block the host until the device has evaluated the condition. Every shard
    gathers all logits and samples all rows.
    """

    def sampler(
        last_token: jax.Array, token: jax.Array, logits: jax.Array, metadata: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        slot, _, inputs = unpack_sampling(metadata, seqs)
        token = sample(_whole_logits(spec, logits), token, inputs)
        return last_token.at[slot].set(token), token

    return _after_step(spec, sampler, "sample", seqs, (REPLICATED, REPLICATED, LOGITS, REPLICATED), donated=(0,))


def make_scorer(spec: StepSpec, seqs: int) -> Any:
    """Returns the jitted program that runs after a step in which a sequence needs log-probabilities.

    `(token int32 [seqs], logits float32 [seqs, vocab], metadata int32 [9 seqs]) -> Sampled`. A target in the metadata
    replaces the token.
    """

    def scorer(token: jax.Array, logits: jax.Array, metadata: jax.Array) -> Sampled:
        _, target, _ = unpack_sampling(metadata, seqs)
        return score(_whole_logits(spec, logits), jnp.where(target < 0, token, target))

    return _after_step(spec, scorer, "logprobs", seqs, (REPLICATED, LOGITS, REPLICATED))


def _whole_logits(spec: StepSpec, logits: jax.Array) -> jax.Array:
    return logits if spec.parallel is None else vocabulary.gather_logits(logits, spec.model.vocab_size)


def _after_step(
    spec: StepSpec,
    function: Any,
    kind: str,
    seqs: int,
    specs: tuple[Any, ...],
    outputs: Any = REPLICATED,
    donated: tuple[int, ...] = (),
) -> Any:
    if spec.parallel is not None:
        mesh = spec.parallel.mesh
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=outputs, check_vma=False)
    function.__name__ = after_step_name(kind, seqs)
    return jax.jit(function, donate_argnums=donated)


def after_step_name(kind: str, seqs: int) -> str:
    """Name of a program of `AFTER_STEP`."""
    return f"{kind}_{seqs}"


def sampler_shapes(spec: StepSpec, seqs: int) -> tuple[Any, ...]:
    """Returns the shapes of a sampler's arguments, like `step_shapes`."""
    return _replicated(spec, spec.state_struct().last_token), *scorer_shapes(spec, seqs)


def scorer_shapes(spec: StepSpec, seqs: int) -> tuple[Any, ...]:
    """Returns the shapes of a searcher's and of a scorer's arguments, like `step_shapes`."""
    logits = jax.ShapeDtypeStruct((seqs, spec.shard_model.vocab_size), jnp.float32)
    if spec.parallel is not None:
        logits = spec.parallel.struct(logits, LOGITS)
    metadata = jax.ShapeDtypeStruct((len(SAMPLER_FIELDS) * seqs,), jnp.int32)
    return _replicated(spec, jax.ShapeDtypeStruct((seqs,), jnp.int32)), logits, _replicated(spec, metadata)


def constrainer_shapes(spec: StepSpec, seqs: int) -> tuple[Any, ...]:
    """Returns the shapes of a constrainer's arguments, like `step_shapes`."""
    allowed = jax.ShapeDtypeStruct((seqs, mask_words(spec)), jnp.int32)
    biases = (jax.ShapeDtypeStruct((seqs, MAX_LOGIT_BIAS), dtype) for dtype in (jnp.int32, jnp.float32))
    return *sampler_shapes(spec, seqs), *_replicated(spec, (allowed, *biases))


def mask_words(spec: StepSpec) -> int:
    """Number of 32-bit words that hold one bit for each logit, including the padding of several shards."""
    return ceil_div(spec.shard_model.vocab_size * spec.shards.count, 32)


def _replicated(spec: StepSpec, structs: Any) -> Any:
    return structs if spec.parallel is None else replicated(spec.parallel, structs)


AFTER_STEP = {
    "constrain": (make_constrainer, constrainer_shapes),
    "cutoff": (make_searcher, scorer_shapes),
    "sample": (make_sampler, sampler_shapes),
    "logprobs": (make_scorer, scorer_shapes),
}
"""Programs that may run after a step, in this order, each with the shapes of its arguments."""
