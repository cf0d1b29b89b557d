"""The products with experts against float64, where the weights of experts that no token has chosen are NaN."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import compiling_for
from pallas_kernels.experts import expert_outputs, triton
from pallas_kernels.experts.plan import ExpertPlan, ProductPlan
from pallas_kernels.targets import TARGETS, compile_for
from pallas_kernels.weight_format import ScaledKernels
from slora_jax.analysis import kernels_in
from slora_jax.analysis.hlo import launches
from slora_jax.models.quantised import quantise_kernel

# Blocks that divide neither width of `layer`, and blocks that divide both.
RAGGED = ExpertPlan(16, ProductPlan(16, 32, 4, 2), ProductPlan(32, 16, 4, 2))
EVEN = ExpertPlan(32, ProductPlan(16, 16, 4, 2), ProductPlan(16, 16, 4, 2))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "triton"])


def layer(rng: np.random.Generator, dtype: str, tokens: int, experts: int, d: int = 40, ffn: int = 24):
    """Inputs `[tokens, d]`, and the weights of the experts."""
    shapes = (tokens, d), (experts, d, 2 * ffn), (experts, ffn, d)
    return [jnp.asarray(rng.standard_normal(shape) * shape[-2] ** -0.5, dtype) for shape in shapes]


@jax.jit(static_argnames=("activation", "implementation", "plan"))
def jitted(x, chosen, weights, gate_up, down, activation, implementation, plan):
    arrays = x, chosen.astype(jnp.int32), weights.astype(jnp.float32), gate_up, down
    return expert_outputs(*arrays, activation=activation, implementation=implementation, interpret=True, plan=plan)


def run(implementation: str, *arrays, activation="silu", plan=RAGGED) -> np.ndarray:
    return np.asarray(jitted(*arrays, activation, implementation, plan))


def expected(x, chosen, weights, gate_up, down, activation="silu") -> np.ndarray:
    x, gate_up, down = (np.asarray(a, np.float64) for a in (x, gate_up, down))
    out = np.zeros_like(x)
    for token, (experts, shares) in enumerate(zip(chosen, weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if expert < len(down):
                gate, up = np.split(x[token] @ gate_up[expert], 2)
                wide = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
                active = gate / (1 + np.exp(-gate)) if activation == "silu" else gate * (1 + np.tanh(wide)) / 2
                out[token] += share * ((active * up) @ down[expert])
    return out


def random_choice(rng: np.random.Generator, tokens: int, per_token: int, among: np.ndarray) -> np.ndarray:
    return np.stack([rng.permutation(among)[:per_token] for _ in range(tokens)])


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("dtype", "activation", "tokens", "experts", "per_token", "used"),
    [
        ("float32", "gelu_tanh", 1, 20, 8, 20),
        ("float32", "silu", 37, 5, 1, 4),
        ("bfloat16", "silu", 25, 9, 8, 8),  # more rows than are counted at once, and each expert has all tokens
    ],
)
def test_outputs_equal_float64_and_unused_experts_are_not_read(
    implementation, dtype, activation, tokens, experts, per_token, used, rng, monkeypatch
):
    monkeypatch.setattr(triton, "COUNTED", 128)
    x, gate_up, down = layer(rng, dtype, tokens, experts)
    among = rng.permutation(experts)[:used]
    chosen = random_choice(rng, tokens, per_token, among)
    chosen[tokens // 3 : tokens // 2] = experts  # tokens without experts
    weights = rng.random((tokens, per_token))
    unused = np.setdiff1d(np.arange(experts), chosen)
    assert tokens == 37 or tokens == 150 or len(unused)
    gate_up, down = (a.at[unused].set(jnp.nan) for a in (gate_up, down))
    found = run(implementation, x, chosen, weights, gate_up, down, activation=activation)
    reference = expected(x, chosen, weights, gate_up, down, activation)
    error = 2e-6 if dtype == "float32" else 2e-2
    assert found.dtype == x.dtype
    assert np.abs(found.astype(np.float64) - reference).max() <= error * np.abs(reference).max()


@pytest.mark.parametrize(
    ("implementation", "weights", "dtype"),
    [
        ("xla", "int8", "float32"),
        ("xla", "int4", "float32"),
        ("triton", "int8", "bfloat16"),
        ("triton", "fp8", "bfloat16"),
    ],
)
def test_quantised_experts_equal_float64_over_the_dequantised_kernels(implementation, weights, dtype, rng):
    """int4 has three groups of 16 inputs and one of 32. Gradients are those of the dequantised kernels."""
    x, *kernels = layer(rng, dtype, 19, 6, d=48, ffn=32)
    chosen, shares = random_choice(rng, 19, 2, np.arange(5)), rng.random((19, 2))
    stored, wide = [], []
    for kernel in kernels:
        parts = quantise_kernel(np.asarray(kernel), weights)
        codes, scale = jnp.asarray(parts["kernel"]), jnp.asarray(parts["scale"])
        values = parts["kernel"].astype(np.float64)
        wide.append(values * np.repeat(parts["scale"], values.shape[1] // scale.shape[1], axis=1))
        stored.append(ScaledKernels(codes, scale.at[5].set(jnp.nan)))
    found, reference = run(implementation, x, chosen, shares, *stored), expected(x, chosen, shares, *wide)
    error = 2e-6 if dtype == "float32" else 2e-2
    assert np.abs(found.astype(np.float64) - reference).max() <= error * np.abs(reference).max()
    if dtype == "float32":

        def slope(kernels):
            def loss(x):
                return (jitted(x, chosen, shares, *kernels, "silu", implementation, RAGGED) ** 2).sum()

            return jax.grad(loss)(x)

        exact = slope([jnp.asarray(kernel, jnp.float32) for kernel in wide])
        np.testing.assert_allclose(slope(stored), exact, atol=1e-5 * float(jnp.abs(exact).max()))


def test_formats_that_triton_does_not_take_are_refused(rng):
    x, gate_up, down = layer(rng, "bfloat16", 1, 2)
    chosen, shares = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    for codes, target, message in (("int4", "h200", "int4 weights"), ("float8_e4m3fn", "a100", "fp8 weights on a100")):
        own = [ScaledKernels(k.astype(codes), jnp.ones((2, 1, k.shape[2]))) for k in (gate_up, down)]
        with compiling_for(TARGETS[target].device), pytest.raises(NotImplementedError, match=message):
            expert_outputs(x, chosen, shares, *own, activation="silu", implementation="triton")


@IMPLEMENTATIONS
def test_a_tokens_bits_do_not_depend_on_the_other_tokens(implementation, rng):
    """Alone, and in a batch in which its experts have other tokens; tiles of two heights, blocks that divide widths."""
    x, gate_up, down = layer(rng, "bfloat16", 20, 6, d=32, ffn=16)
    chosen, weights = random_choice(rng, 20, 2, np.arange(6)), rng.random((20, 2))
    for plan in (RAGGED, EVEN) if implementation == "triton" else (RAGGED,):
        together = run(implementation, x, chosen, weights, gate_up, down, plan=plan)
        for token in (0, 19):
            one = slice(token, token + 1)
            alone = run(implementation, x[one], chosen[one], weights[one], gate_up, down, plan=plan)
            np.testing.assert_array_equal(alone[0], together[token])


def test_gradients_are_those_of_the_reference(rng):
    x, gate_up, down = layer(rng, "float32", 5, 4)
    chosen, weights = random_choice(rng, 5, 2, np.arange(4)), jnp.asarray(rng.random((5, 2)), jnp.float32)

    def gradients(implementation):
        def loss(x, weights):
            y = jitted(x, jnp.asarray(chosen), weights, gate_up, down, "silu", implementation, RAGGED)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, weights)

    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, gradients("triton"), gradients("xla"))


@pytest.mark.parametrize(
    ("name", "sizes", "codes"), [("h200", (64, 1024, 8192), "float8_e4m3fn"), ("a100", (64, 8192), "int8")]
)
def test_kernels_compile_without_spills(name, sizes, codes):
    """Qwen3-30B-A3B's experts, with few and many rows an expert, and quantised with few."""
    target, (experts, per_token, d, ffn) = TARGETS[name], (128, 8, 2048, 768)

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def layers(steps, weights):
        return [expert_outputs(*step, *own, activation="silu") for step, own in zip(steps, weights, strict=True)]

    shapes, sizes = ((experts, d, 2 * ffn), (experts, ffn, d)), (*sizes, sizes[0])
    plain = [struct(*shape) for shape in shapes]
    weights = [plain] * (len(sizes) - 1) + [
        [
            ScaledKernels(struct(*shape, dtype=codes), struct(experts, 1, shape[2], dtype=jnp.float32))
            for shape in shapes
        ]
    ]
    steps = [
        (struct(t, d), struct(t, per_token, dtype=jnp.int32), struct(t, per_token, dtype=jnp.float32)) for t in sizes
    ]
    compiled = compile_for(target, jax.jit(layers), steps, weights)
    uses = kernels_in(compiled, target.device)
    launched = {use.name: sum(u.count for u in uses if u.name == use.name) for use in uses}
    names = "expert_tiles_kernel", "expert_gate_up_kernel", "expert_down_kernel"
    assert launched == dict.fromkeys(names, len(sizes))
    for use in uses:
        assert use.spill_bytes == 0 and use.registers <= 255 and use.shared_bytes <= target.device.shared_bytes, use
        if use.name != "expert_tiles_kernel":
            assert "mma" in use.ptx and "cp.async.cg.shared.global" in use.ptx, use
    text = compiled.as_text()
    assert launches(text) <= 5 * len(sizes)  # three kernels, the mask of padding, the sum
