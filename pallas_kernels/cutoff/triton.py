"""The Triton kernel: one program searches one row, which stays in the L2 cache, in passes over the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton_call import triton_call

BLOCK, NUM_WARPS = 4096, 16


@triton.jit
def _weights(logits, at, largest, temperature, last, vocab: tl.constexpr, by_count: tl.constexpr):
    """Returns the bit patterns of the distances to the largest logit, and the weights, of one block of tokens."""
    logit = tl.load(logits + at, mask=at < vocab, other=float("-inf"))
    distance = largest - logit
    bits = distance.to(tl.int32, bitcast=True)
    if by_count:
        weight = tl.where(at < vocab, 1.0, 0.0)
    else:
        weight = tl.where(bits <= last, tl.exp(-distance / temperature), 0.0)
    return bits, weight


@triton.jit
def _first_reaching(
    logits, largest, temperature, last, enough, vocab: tl.constexpr, block: tl.constexpr, by_count: tl.constexpr
):
    """Returns the smallest bit pattern for which the tokens up to it weigh `enough`, two bits in each pass."""
    found = 0
    for step in range(16):
        shift = 30 - 2 * step
        first = found + (1 << shift) - 1
        second = found + (2 << shift) - 1
        third = found + (3 << shift) - 1
        third = tl.where(third < 0, 0x7FFFFFFF, third)  # the first pass has one bit besides the sign
        up_to_first = tl.zeros([block], tl.float32)
        up_to_second = tl.zeros([block], tl.float32)
        up_to_third = tl.zeros([block], tl.float32)
        for start in range(0, vocab, block):
            bits, weight = _weights(logits, start + tl.arange(0, block), largest, temperature, last, vocab, by_count)
            up_to_first += tl.where(bits <= first, weight, 0.0)
            up_to_second += tl.where(bits <= second, weight, 0.0)
            up_to_third += tl.where(bits <= third, weight, 0.0)
        digit = (tl.sum(up_to_first) < enough).to(tl.int32)
        digit += (tl.sum(up_to_second) < enough).to(tl.int32)
        digit += (tl.sum(up_to_third) < enough).to(tl.int32)
        found += digit << shift
    return tl.where((found < 0) | (found > 0x7F800000), 0x7F800000, found)


@triton.jit
def cutoff_kernel(logits, best, temperature, top_k, top_p, cutoff, vocab: tl.constexpr, block: tl.constexpr):
    """Writes the cutoff of one row. Arguments as in `api.cutoff`, with `best` not negative."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab
    largest = tl.load(logits + tl.load(best + row))
    t, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    last = 0x7F800000
    if t > 0:
        if k > 0:
            count = tl.minimum(k, vocab).to(tl.float32)
            last = _first_reaching(logits, largest, t, last, count, vocab, block, by_count=True)
        if p < 1:
            sums = tl.zeros([block], tl.float32)
            for start in range(0, vocab, block):
                _, weight = _weights(logits, start + tl.arange(0, block), largest, t, last, vocab, by_count=False)
                sums += weight
            enough = p * tl.sum(sums)
            last = tl.minimum(last, _first_reaching(logits, largest, t, last, enough, vocab, block, by_count=False))
    tl.store(cutoff + row, last.to(tl.float32, bitcast=True))  # type: ignore[attr-defined]


def cutoff(
    logits: jax.Array,
    best: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """See `api.cutoff`."""
    rows, vocab = logits.shape
    (found,) = triton_call(
        cutoff_kernel, logits, best, temperature, top_k, top_p,
        out=[jax.ShapeDtypeStruct((rows,), jnp.float32)], grid=(rows,), num_warps=NUM_WARPS, num_stages=3,
        interpret=interpret, vocab=vocab, block=min(BLOCK, triton.next_power_of_2(vocab)),
    )  # fmt: skip
    return found
