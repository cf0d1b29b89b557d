"""The threshold of top-k and top-p, exact to the last bit, by XLA and by the Triton kernel under its interpreter; the
kernel compiled for absent GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cutoff import cutoff
from pallas_kernels.targets import TARGETS, compile_for
from slora_jax.analysis import kernels_in

ROWS, VOCAB = 6, 4500
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "triton"])


def run(implementation: str, logits: np.ndarray, temperature, top_k, top_p) -> np.ndarray:
    fields = (np.broadcast_to(x, len(logits)).astype(t) for x, t in ((temperature, "f4"), (top_k, "i4"), (top_p, "f4")))
    best = np.argmax(logits, axis=1).astype(np.int32)
    return np.asarray(cutoff(logits, best, *fields, implementation=implementation, interpret=True))


@IMPLEMENTATIONS
def test_top_k_is_exact_to_the_last_bit(implementation: str, rng: np.random.Generator) -> None:
    """Neighbouring float32 numbers, ties, infinities and a vocabulary that is no multiple of a block."""
    logits = (rng.standard_normal((ROWS, VOCAB)) * rng.choice([1e-30, 1, 1e30], (ROWS, 1))).astype(np.float32)
    logits[::3] = np.float32(1) + rng.integers(-300, 300, (ROWS // 3, VOCAB)) * np.float32(2**-23)
    logits[1::3, ::2] = -np.inf
    top_k = rng.choice([0, 1, 2, 50, 2249, 2250, 2251, VOCAB - 1, VOCAB, 2**31 - 1], ROWS)
    found = run(implementation, logits, 1.0, top_k, 1.0)
    distance = np.sort(logits.max(1, keepdims=True) - logits, axis=1)
    expected = distance[np.arange(ROWS), np.minimum(top_k, VOCAB) - 1]
    np.testing.assert_array_equal(found[top_k > 0], expected[top_k > 0])
    assert (found[top_k == 0] == np.inf).all()


@IMPLEMENTATIONS
def test_top_p_is_the_share_of_what_top_k_leaves(implementation: str, rng: np.random.Generator) -> None:
    logits = (3 * rng.standard_normal((ROWS, VOCAB))).astype(np.float32)
    temperature = rng.choice([0.0, 0.3, 1.0, 5.0], ROWS).astype(np.float32)
    top_k = rng.choice([0, 5, 60], ROWS)
    top_p = rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0], ROWS).astype(np.float32)
    found = run(implementation, logits, temperature, top_k, top_p)
    for row in np.flatnonzero(temperature > 0):
        distance = np.sort(logits[row].max() - logits[row])[: top_k[row] or VOCAB]
        p = np.exp(-distance.astype(np.float64) / temperature[row])
        expected = distance[-1]
        if top_p[row] < 1:
            expected = distance[np.searchsorted(np.cumsum(p), np.float64(top_p[row]) * p.sum())]
        assert found[row] == expected or (found[row] == np.inf and top_k[row] == 0 and top_p[row] == 1)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_kernel_compiles_without_spills(target) -> None:
    def search(*args: jax.Array) -> jax.Array:
        return cutoff(*args)

    rows = [jax.ShapeDtypeStruct((256,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32, jnp.float32)]
    compiled = compile_for(target, jax.jit(search), jax.ShapeDtypeStruct((256, 128_256), jnp.float32), *rows)
    (kernel,) = kernels_in(compiled, target.device)
    assert (kernel.name, kernel.count, kernel.spill_bytes) == ("cutoff_kernel", 1, 0)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
