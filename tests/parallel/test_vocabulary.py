"""Embedding and greedy choice over a sharded vocabulary of indivisible size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from slora_jax.parallel import vocabulary
from slora_jax.parallel.mesh import AXIS, make_mesh

DEGREE, VOCAB, SIZE = 4, 10, 3  # the last shard has one token and two padding columns


def over_shards(function, *arrays, specs):
    mapped = jax.shard_map(function, mesh=make_mesh(DEGREE), in_specs=specs, out_specs=P(), check_vma=False)
    return np.asarray(jax.jit(mapped)(*arrays))


def test_greedy_is_argmax_and_the_first_of_equals(rng: np.random.Generator) -> None:
    logits = np.full((64, DEGREE * SIZE), 99.0, np.float32)  # padding columns must not win
    logits[:, :VOCAB] = rng.integers(-4, 4, (64, VOCAB))  # many ties, between shards too
    logits[0, 3:5] = -np.inf
    tokens = over_shards(partial(vocabulary.greedy, vocab_size=VOCAB), logits, specs=P(None, AXIS))
    np.testing.assert_array_equal(tokens, logits[:, :VOCAB].argmax(-1))
    assert tokens.dtype == np.int32


def test_rows_that_are_not_finite_have_no_token(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((2 * VOCAB + 2, DEGREE * SIZE)).astype(np.float32)
    for token in range(VOCAB):
        logits[2 * token, token], logits[2 * token + 1, token] = np.nan, np.inf
    logits[-2, :VOCAB] = -np.inf
    tokens = over_shards(partial(vocabulary.greedy, vocab_size=VOCAB), logits, specs=P(None, AXIS))
    np.testing.assert_array_equal(tokens, [-1] * (2 * VOCAB + 1) + [logits[-1, :VOCAB].argmax()])


def test_each_token_gets_its_embedding(rng: np.random.Generator) -> None:
    table = rng.standard_normal((DEGREE * SIZE, 5)).astype(np.float32)
    tokens = np.arange(VOCAB, dtype=np.int32)

    def embed(part, ids):
        return vocabulary.embed(lambda row: jnp.take(part, row, axis=0, mode="clip"), ids, SIZE)

    found = over_shards(embed, table, tokens, specs=(P(AXIS, None), P()))
    np.testing.assert_array_equal(found, table[:VOCAB])


def test_gathered_logits_have_no_padding(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((3, DEGREE * SIZE)).astype(np.float32)
    found = over_shards(partial(vocabulary.gather_logits, vocab_size=VOCAB), logits, specs=P(None, AXIS))
    np.testing.assert_array_equal(found, logits[:, :VOCAB])
