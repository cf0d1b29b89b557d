"""Accuracy of COMET's arithmetic (arXiv 2410.12168): weights, most activations and KV in 4 bits. It measures no speed.

    python -m experiments.comet --tokens 4096

The input channels of each projection are sorted by their largest magnitude in a calibration window, so that outliers
lie together, and cut into blocks of 128. A token's block has one scale; the first blocks keep 8 bits, the others 4
(FMPQ). Weights are int4 as the engine's, in groups of sorted channels. Keys and values have 16 levels between the least
and the largest value of each token and head.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.machine import provenance, write_json
from experiments.quantisation import WINDOW, Context, Model, digest_of, run_layer, windows
from experiments.results_page.section import RESULTS
from slora_jax.demo.smollm2 import REQUIREMENT, smollm2_path
from slora_jax.errors import ConfigError
from slora_jax.models import Params
from slora_jax.models.projections import STACKS
from slora_jax.models.quantised import dequantised, quantise_kernel

BLOCK = 128
"""Channels that share a scale of a token's activations."""
OUTPUT = RESULTS / "comet.json"


class Kernel(NamedTuple):
    """An int4 kernel, dequantised. order: int32 `[d_in]`, its input channels. values: float32 `[d_in, d_out]`."""

    order: jax.Array
    values: jax.Array


class Format(NamedTuple):
    """The roundings of a run, besides those of the weights.

    Attributes:
      high: blocks of 8 bits in each projection's input; None: activations are not rounded.
      kv: whether keys and values are rounded.
    """

    high: int | None
    kv: bool


FORMATS = {
    "int4 weights": Format(None, False),
    "and int4 KV": Format(None, True),
    "and activations, all blocks 8 bits": Format(1_000, True),
    "two blocks 8 bits": Format(2, True),
    "one block 8 bits": Format(1, True),
    "no block 8 bits": Format(0, True),
}


def round_blocks(x: jax.Array, high: int) -> jax.Array:
    """Rounds each block of `x` `[T, d]` to 8 bits (-127..127; the first `high` blocks) or 4 bits (-7..7)."""
    rounded = []
    for start in range(0, x.shape[1], BLOCK):
        block = x[:, start : start + BLOCK]
        most = 127 if start < high * BLOCK else 7
        scale = jnp.maximum(jnp.abs(block).max(1, keepdims=True) / most, jnp.finfo(jnp.float32).tiny)
        rounded.append(jnp.round(block / scale) * scale)
    return jnp.concatenate(rounded, axis=1)


def round_kv(kv: jax.Array) -> jax.Array:
    """Rounds keys or values `[T, heads, head_dim]` to 16 levels for each token and head."""
    least = kv.min(-1, keepdims=True)
    scale = jnp.maximum((kv.max(-1, keepdims=True) - least) / 15, jnp.finfo(jnp.float32).tiny)
    return jnp.round((kv - least) / scale) * scale + least


class CometContext(Context):
    """Computes each projection with its int4 kernel in place of the layer's own, which XLA then leaves out."""

    def __init__(self, kernels: Mapping[str, Kernel], kind: Format) -> None:
        super().__init__()
        self._kernels, self._format = kernels, kind

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        if self._format.kv:
            k, v = round_kv(k), round_kv(v)
        return super().attend(layer, q, k, v, window)

    def lora(self, layer: int, stack: str, x: jax.Array, y: jax.Array) -> jax.Array:
        order, values = self._kernels[stack]
        x = x[:, order]
        x = x if self._format.high is None else round_blocks(x, self._format.high)
        return jnp.dot(x, values, precision=jax.lax.Precision.HIGHEST)


class _Calibration(Context):
    """Keeps the largest magnitude of each input channel, `[d_in]` by stack."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, jax.Array] = {}

    def lora(self, layer: int, stack: str, x: jax.Array, y: jax.Array) -> jax.Array:
        self.largest[stack] = jnp.abs(x).max(0)
        return y


def int4_kernel(kernel: Any, largest: Any) -> Kernel:
    """Sorts the input channels of `kernel` `[d_in, d_out]` by `largest` `[d_in]`, and rounds it."""
    order = np.argsort(-np.asarray(largest), kind="stable").astype(np.int32)
    own = quantise_kernel(np.asarray(kernel)[order], "int4")
    codes, scale = jnp.asarray(own["kernel"]), jnp.asarray(own["scale"])
    return Kernel(jnp.asarray(order), dequantised(codes, scale, np.dtype(np.float32)))


def calibrate(model: Model, tokens: np.ndarray) -> list[dict[str, Kernel]]:
    """Returns the kernels of each layer, ordered by the activations of one window."""

    @jax.jit
    def run(params: Params, x: jax.Array, tables: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        context = _Calibration()
        return run_layer(model.config, params, context, x, tables), context.largest

    kernels = []

    def layer(params: Params, _: None, x: jax.Array, tables: Any) -> jax.Array:
        x, largest = run(params, x, tables)
        kernels.append({stack: int4_kernel(params[stack]["kernel"], largest[stack]) for stack in STACKS})
        return x

    model.through_layers(tokens, None, layer)
    return kernels


def share_of_4_bits(kernels: Mapping[str, Kernel], high: int) -> float:
    """The share of blocks of 4 bits, over a layer's projections."""
    blocks = [-(-len(kernel.order) // BLOCK) for kernel in kernels.values()]
    return sum(max(0, count - high) for count in blocks) / sum(blocks)


def _jitted(model: Model, kind: Format) -> Any:
    return jax.jit(
        lambda params, kernels, *inputs: run_layer(model.config, params, CometContext(kernels, kind), *inputs)
    )


def measure(path: Path, tokens: int) -> dict[str, Any]:
    """Returns the measures of all formats over the first `tokens` of the text."""
    text = windows(path)
    count = tokens // WINDOW
    if not 1 <= count < len(text) or tokens % WINDOW:
        raise ConfigError(f"--tokens={tokens}: must be a multiple of {WINDOW}, at most {WINDOW * (len(text) - 1)}")
    model = Model(path, None)
    kernels = calibrate(model, text[-1])
    layers = {name: _jitted(model, kind) for name, kind in FORMATS.items()}
    sums = dict.fromkeys(("float32", *FORMATS), np.zeros(3))
    for window in tqdm(text[:count], desc="windows"):
        hidden = model.hidden(window, None)
        expected = model.log_probabilities(hidden)
        sums["float32"] = sums["float32"] + model.compare(expected, hidden, window[1:])
        for name, layer in layers.items():
            hidden = model.through_layers(window, kernels, layer)
            sums[name] = sums[name] + model.compare(expected, hidden, window[1:])
    predictions = count * (WINDOW - 1)
    rows = []
    for name, own in sums.items():
        nll, kl, equal = (float(total / predictions) for total in own)
        high = FORMATS[name].high if name in FORMATS else None
        share = None if high is None else round(share_of_4_bits(kernels[0], high), 4)
        rows.append(
            {"format": name, "share_of_4_bits": share, "perplexity": round(float(np.exp(nll)), 4)}
            | {"kl": round(kl, 5), "agreement": round(equal, 4)}
        )
    where = {"provenance": provenance(), "model": path.name, "tokens": tokens, "text": digest_of(text)}
    return where | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.comet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=smollm2_path(), help=f"default: the GGUF file of {REQUIREMENT}")
    parser.add_argument("--tokens", type=int, default=8 * WINDOW, help="a multiple of 512 (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if args.model is None:
        raise ConfigError(f"--model: {REQUIREMENT} is not installed; install it, or name a model")
    write_json(args.output, measure(args.model, args.tokens))


if __name__ == "__main__":
    main()
