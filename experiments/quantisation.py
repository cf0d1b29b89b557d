"""Perplexity, KL divergence and greedy agreement of quantised weights and KV against the unquantised ones.

    python -m experiments.quantisation --windows 40
    python -m experiments.quantisation --only int4
    python -m experiments.quantisation --verify

The text is the data of the small adapters, without what the measured adapters were trained on, in windows of 512
tokens in one random order. Windows that the results file has are not repeated, so a run can be stopped and resumed.
`--verify` compares "int4" with a `transformers` model whose weights NumPy has rounded, on one window.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.machine import provenance, write_json
from experiments.results_page.section import RESULTS, ROOT
from pallas_kernels.kv_format import KvDtype, decode, encode
from slora_jax.adapters import LoraAdapter
from slora_jax.adapters.peft_format import read_peft
from slora_jax.demo.smollm2 import REQUIREMENT, smollm2_path
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.engine.text import load_tokenizer
from slora_jax.errors import ConfigError
from slora_jax.memory.pool import PoolShape
from slora_jax.models import ModelConfig, Params, abstract_decoder, load_model
from slora_jax.models.init import layer_graph
from slora_jax.models.projections import PROJECTIONS, STACKS
from slora_jax.models.quantised import WEIGHT_FORMATS, WeightFormat, dequantised

WINDOW = 512
"""Tokens of a window; each but the last predicts the next."""
BATCH = 4
"""Windows of one call."""
BLOCK = 128
"""Rows of attention at a time."""
KV_FORMATS: tuple[KvDtype | None, ...] = (None, *get_args(KvDtype))
ADAPTERS = Path(ROOT, "slora_jax", "demo", "smollm2_adapters")
NAMES = (None, "french", "json")
OUTPUT = RESULTS / "quantisation.json"


Lora = list[dict[str, tuple[np.ndarray, np.ndarray]]]


class Context:
    """Causal attention within each window, with one adapter's LoRA on the unquantised activations.

    Args:
      lora: A `[d_in, R]` and B `[R, d_out]` of each stack; None: no adapter.
      kv: format of the keys and values; None: they are not rounded.
    """

    def __init__(
        self, lora: Mapping[str, tuple[jax.Array, jax.Array]] | None = None, kv: KvDtype | None = None
    ) -> None:
        self._lora, self._kv = lora, kv

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        k, v = round_kv(k, self._kv), round_kv(v, self._kv)
        return causal_attention(*(x.reshape(-1, WINDOW, *x.shape[1:]) for x in (q, k, v))).reshape(q.shape)

    def lora(self, layer: int, stack: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if self._lora is None:
            return y
        a, b = self._lora[stack]
        return y + jnp.dot(jnp.dot(x, a), b)

    def lookup(self, embedding: Any, tokens: jax.Array) -> jax.Array:
        return embedding(tokens)

    def reduce(self, y: jax.Array) -> jax.Array:
        return y


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attends in blocks of rows, each to the tokens up to its end: 5 times as fast on a CPU as all scores at once.

    Args:
      q: `[n, T, heads, head_dim]`.
      k, v: `[n, T, KV heads, head_dim]`.
    """
    (n, tokens, heads, dim), kv_heads = q.shape, k.shape[2]
    q, k, v = (x.reshape(n, tokens, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4) for x in (q, k, v))
    parts = []
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        rows = q[:, :, :, first:last].reshape(n, kv_heads, -1, dim)
        scores = (rows @ k[:, :, 0, :last].swapaxes(2, 3) / dim**0.5).reshape(n, kv_heads, -1, last - first, last)
        seen = jnp.arange(last) <= jnp.arange(first, last)[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)).reshape(*rows.shape[:3], last)
        parts.append((weights @ v[:, :, 0, :last]).reshape(n, kv_heads, -1, last - first, dim))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(n, tokens, heads, dim)


def round_kv(kv: jax.Array, kind: KvDtype | None) -> jax.Array:
    """Rounds keys or values `[T, heads, head_dim]` as the pool does."""
    if kind is None:
        return kv
    _, heads, dim = kv.shape
    (layer,) = PoolShape(1, 1, 2, heads * dim, "bfloat16", 1, 1, kind, dim).pool_struct()
    rows, scales = encode(kv.reshape(len(kv), -1), layer)
    rounded = decode(rows, kind, kv.dtype).reshape(kv.shape)
    return rounded if scales is None else rounded * scales.astype(kv.dtype)[..., None]


class Model:
    """A decoder run layer by layer in float32, with its quantised kernels dequantised when it is loaded."""

    def __init__(self, path: Path, weights: WeightFormat | None) -> None:
        config = replace(ModelConfig.from_directory(path), weights=weights)
        _, params, config = load_model(path, "float32", progress=False, config=config)
        self.config = replace(config, weights=None)
        self.layers = [{name: _wide(part) for name, part in layer.items()} for layer in params.pop("layers").values()]
        self.ends = params

    def hidden(self, tokens: np.ndarray, lora: Lora | None, kv: KvDtype | None = None) -> jax.Array:
        """Returns the last layer's output `[n * WINDOW, d]` of `tokens` int32 `[n * WINDOW]`."""
        return self.through_layers(tokens, lora, partial(_layer, self.config, kv))

    def through_layers(
        self, tokens: np.ndarray, inputs: list[Any] | None, layer: Callable[..., jax.Array]
    ) -> jax.Array:
        """Returns what `hidden` returns, by `layer(params, inputs of the layer, x, tables)`."""
        x, tables = _begin(self.config, self.ends, tokens)
        for index, params in enumerate(self.layers):
            x = layer(params, None if inputs is None else inputs[index], x, tables)
        return x

    def log_probabilities(self, hidden: jax.Array) -> jax.Array:
        """Maps the last layer's output `[WINDOW, d]` to `[WINDOW, vocab]`."""
        return _log_probabilities(self.config, self.ends, hidden)

    def compare(self, expected: jax.Array, hidden: jax.Array, targets: np.ndarray) -> np.ndarray:
        """Sums over a window's predictions: negative log-likelihood, KL divergence, equal most probable tokens.

        Args:
          expected: log-probabilities `[WINDOW, vocab]` of the reference.
          hidden: `[WINDOW, d]`, the last layer's output.
          targets: int32 `[WINDOW - 1]`.
        """
        return np.asarray(_compare(self.config, self.ends, expected, hidden, targets), np.float64)


def _wide(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a layer, with its kernel in float32."""
    if "kernel" not in part or "scale" not in part:
        return part
    rest = {name: leaf for name, leaf in part.items() if name != "scale"}
    return rest | {"kernel": dequantised(part["kernel"], part["scale"], np.dtype(np.float32))}


def run_layer(config: ModelConfig, params: Params, context: Context, x: jax.Array, tables: Any) -> jax.Array:
    """Maps `x` `[n * WINDOW, d]` to the same shape."""
    return nnx.merge(layer_graph(config, config.kind(0), "float32"), params)(x, tables, context)


def _ends(config: ModelConfig, params: Params) -> Any:
    return nnx.merge(abstract_decoder(replace(config, num_layers=0), "float32")[0], params)


@partial(jax.jit, static_argnums=(0, 1))
def _layer(config: ModelConfig, kv: KvDtype | None, params: Params, lora: Any, *inputs: Any) -> jax.Array:
    return run_layer(config, params, Context(lora, kv), *inputs)


@partial(jax.jit, static_argnums=0)
def _begin(config: ModelConfig, ends: Params, tokens: jax.Array) -> Any:
    return _ends(config, ends).begin(tokens, jnp.arange(len(tokens)) % WINDOW, Context())


@partial(jax.jit, static_argnums=0)
def _log_probabilities(config: ModelConfig, ends: Params, hidden: jax.Array) -> jax.Array:
    decoder = _ends(config, ends)
    return jax.nn.log_softmax(decoder.logits(decoder.end(hidden)), axis=-1)


@partial(jax.jit, static_argnums=0)
def _compare(config: ModelConfig, ends: Params, expected: Any, hidden: Any, targets: Any) -> jax.Array:
    expected, found = expected[:-1], _log_probabilities(config, ends, hidden)[:-1]
    nll = -jnp.take_along_axis(found, targets[:, None], 1).sum()
    kl = (jnp.exp(expected) * (expected - found)).sum()
    return jnp.stack([nll, kl, (expected.argmax(-1) == found.argmax(-1)).sum().astype(jnp.float32)])


def dense_lora(config: ModelConfig, adapter: LoraAdapter) -> Lora:
    """Returns A `[d_in, R]` and B `[R, d_out]` of each stack in each layer, zero where the adapter has no LoRA."""
    rank = int(adapter.ranks.max())
    layers = []
    for index in range(config.num_layers):
        stacks = {}
        for stack, names in STACKS.items():
            dims = [PROJECTIONS[name].dims(config) for name in names]
            a = np.zeros((dims[0][0], rank * len(names)), np.float32)
            b = np.zeros((rank * len(names), sum(d_out for _, d_out in dims)), np.float32)
            column = 0
            for number, (name, (_, d_out)) in enumerate(zip(names, dims, strict=True)):
                if (key := (index, name)) in adapter.a:
                    rows = slice(number * rank, number * rank + len(adapter.a[key]))
                    a[:, rows] = adapter.a[key].T
                    b[rows, column : column + d_out] = adapter.scales[key] * adapter.b[key].T
                column += d_out
            stacks[stack] = a, b
        layers.append(stacks)
    return layers


def windows(path: Path) -> list[np.ndarray]:
    """Returns the text's windows, int32 `[WINDOW]` each, in the order of their use."""
    texts = []
    for file in sorted((ROOT / "experiments" / "adapters" / "data").glob("*.jsonl")):
        if file.stem not in NAMES:
            for line in file.read_text().splitlines():
                texts.append("\n".join(message["content"] for message in json.loads(line)["messages"]))
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    ids = np.array(tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"], np.int32)
    cut = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return [cut[i] for i in np.random.default_rng(0).permutation(len(cut))]


def digest_of(text: list[np.ndarray]) -> str:
    """Returns the SHA-256 of the windows of a text, in hexadecimal."""
    return hashlib.sha256(b"".join(window.tobytes() for window in text)).hexdigest()


def _key(weights: str | None, kv: str | None, adapter: str | None) -> str:
    return f"{weights or 'float32'}/{kv or 'float32'}/{adapter or 'base'}"


def rows(sums: Mapping[str, list[list[float]]]) -> Iterator[dict[str, Any]]:
    """Yields the measures of each combination with each adapter, over the windows that all have."""
    count = min(map(len, sums.values()))
    predictions = count * (WINDOW - 1)
    for key, own in sums.items():
        weights, kv, adapter = key.split("/")
        nll, kl, equal = np.sum(own[:count], axis=0)
        yield {
            "weights": weights,
            "kv": kv,
            "adapter": adapter,
            "perplexity": round(float(np.exp(nll / predictions)), 4),
            "kl": round(float(kl / predictions), 5),
            "agreement": round(float(equal / predictions), 4),
        }


def measure(path: Path, formats: list[WeightFormat], count: int, output: Path) -> None:
    """Extends the results file to `count` windows."""
    text = windows(path)
    digest = digest_of(text)
    old = json.loads(output.read_text()) if output.exists() else {"text": digest, "sums": {}}
    if old.get("text") != digest:
        raise ConfigError(f"--output={output}: is of another text. Remove it, or name another file")
    sums: dict[str, list[list[float]]] = old["sums"]
    if count > len(text):
        raise ConfigError(f"--windows={count}: must be at most {len(text)}, all of the text")
    kinds: tuple[WeightFormat | None, ...] = (None, *formats)
    models = {weights: Model(path, weights) for weights in kinds}
    reference = models[None]
    geometry = adapter_geometry(reference.config, 16)
    loras = {
        name: None if name is None else dense_lora(reference.config, read_peft(ADAPTERS / name, geometry))
        for name in NAMES
    }
    lengths = {key: len(sums.setdefault(_key(*key), [])) for key in product(models, KV_FORMATS, NAMES)}
    with tqdm(total=count, initial=min(min(lengths.values()), count), desc="windows") as bar:
        while (first := min(lengths.values())) < count:
            last = min(first + BATCH, count, *(n for n in lengths.values() if n > first))
            for name, lora in loras.items():
                missing = [key for key, n in lengths.items() if key[2] == name and n == first]
                batch = np.concatenate(text[first:last])
                expected = reference.hidden(batch, lora).reshape(last - first, WINDOW, -1)
                found = {
                    key: expected
                    if key[:2] == (None, None)
                    else models[key[0]].hidden(batch, lora, key[1]).reshape(expected.shape)
                    for key in missing
                }
                for index, window in enumerate(text[first:last]):
                    exact = reference.log_probabilities(expected[index])
                    for key, hidden in found.items():
                        sums[_key(*key)].append(reference.compare(exact, hidden[index], window[1:]).tolist())
            lengths = {key: len(sums[_key(*key)]) for key in lengths}
            _write(output, path, sums, digest)
            bar.update(last - first)


def _write(output: Path, path: Path, sums: Mapping[str, list[list[float]]], digest: str) -> None:
    old = json.loads(output.read_text()) if output.exists() else {}
    done = {key: own for key, own in sums.items() if own}
    content = {
        "provenance": provenance(),
        "model": path.name,
        "tokens": min(map(len, done.values())) * WINDOW,
        "rows": list(rows(done)),
        "verification": old.get("verification"),
        "text": digest,
        "sums": done,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def verify(path: Path, output: Path) -> None:
    """Adds to the results file the KL divergence of "int4" and of plain rounding, each on one window, here and in
    `transformers` with weights rounded by NumPy."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from slora_jax.demo.reference_weights import read_reference

    tokens = windows(path)[0]
    weights, fields = read_reference(path)
    vocab = len(weights["model.embed_tokens.weight"])
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    config = LlamaConfig(
        **fields,
        rope_parameters=rope,
        vocab_size=vocab,
        intermediate_size=len(weights["model.layers.0.mlp.up_proj.weight"]),
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).float().eval()

    def run(changed: Mapping[str, np.ndarray]) -> np.ndarray:
        state = {name: torch.tensor(np.ascontiguousarray(value, np.float32)) for name, value in changed.items()}
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None].astype(np.int64))).logits[0]
        return torch.log_softmax(logits, -1).numpy()

    def rounded(kernel: np.ndarray) -> np.ndarray:
        groups = kernel.reshape(len(kernel), -1, 64)
        step = np.abs(groups).max(-1, keepdims=True) / 7
        return (np.round(groups / step) * step).reshape(kernel.shape)

    expected = run(weights)
    plain = run({n: rounded(w) if n.endswith("_proj.weight") else w for n, w in weights.items()})
    kinds: tuple[WeightFormat | None, ...] = (None, "int4")
    models = [Model(path, weights) for weights in kinds]
    exact, int4 = (np.asarray(model.log_probabilities(model.hidden(tokens, None))) for model in models)

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return round(float((np.exp(p[:-1]) * (p[:-1] - q[:-1])).sum(-1).mean()), 5)

    content = json.loads(output.read_text())
    content["verification"] = {
        "unquantised": kl(expected, exact),
        "plain_in_transformers": kl(expected, plain),
        "int4": kl(exact, int4),
        "group": 64,
    }
    write_json(output, content)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.quantisation", description=__doc__)
    parser.add_argument("--model", type=Path, default=smollm2_path(), help=f"default: the GGUF file of {REQUIREMENT}")
    parser.add_argument("--only", choices=WEIGHT_FORMATS, action="append", help="measure this format; may be repeated")
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--verify", action="store_true", help="compare int4 with transformers on one window instead")
    args = parser.parse_args()
    if args.model is None:
        raise ConfigError(f"--model: {REQUIREMENT} is not installed; install it, or name a model")
    if args.verify:
        verify(args.model, args.output)
    else:
        measure(args.model, args.only or list(WEIGHT_FORMATS), args.windows, args.output)


if __name__ == "__main__":
    main()
