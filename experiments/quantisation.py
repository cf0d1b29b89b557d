"""Perplexity, KL divergence and greedy agreement of quantised weights against the unquantised ones.

    python -m experiments.quantisation --windows 40
    python -m experiments.quantisation --only int4
    python -m experiments.quantisation --verify

The text is the project's own: README, documents, and the data of the small adapters, in windows of 512 tokens in one
random order. Windows that the results file has are not repeated, so a run can be resumed while the text is the same.
`--verify` compares "int4" with a `transformers` model whose weights NumPy has rounded, on one window.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.machine import provenance, write_json
from experiments.results_page.section import RESULTS, ROOT
from slora_jax.adapters import LoraAdapter
from slora_jax.adapters.peft_format import read_peft
from slora_jax.demo.smollm2 import REQUIREMENT, smollm2_path
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.engine.text import load_tokenizer
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig, Params, abstract_decoder, load_model
from slora_jax.models.init import layer_graph
from slora_jax.models.projections import PROJECTIONS, STACKS
from slora_jax.models.quantised import WEIGHT_FORMATS, WeightFormat

WINDOW = 512
"""Tokens of a window; each but the last predicts the next."""
ADAPTERS = Path(ROOT, "slora_jax", "demo", "smollm2_adapters")
NAMES = (None, "french", "json")
OUTPUT = RESULTS / "quantisation.json"


class Context:
    """Causal attention within one window, with one adapter's LoRA on the unquantised activations."""

    def __init__(self, lora: Mapping[str, tuple[jax.Array, jax.Array]] | None = None) -> None:
        self._lora = lora

    def attend(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
        mixed = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)
        return mixed[0]

    def lora(self, layer: int, stack: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if self._lora is None:
            return y
        a, b = self._lora[stack]
        return y + jnp.dot(jnp.dot(x, a), b)

    def lookup(self, embedding: Any, tokens: jax.Array) -> jax.Array:
        return embedding(tokens)

    def reduce(self, y: jax.Array) -> jax.Array:
        return y


class Model:
    """A decoder in one format, run layer by layer in float32."""

    def __init__(self, path: Path, weights: WeightFormat | None) -> None:
        config = replace(ModelConfig.from_directory(path), weights=weights)
        _, self.params, self.config = load_model(path, "float32", progress=False, config=config)
        self._ends = {name: leaf for name, leaf in self.params.items() if name != "layers"}
        graph = abstract_decoder(replace(self.config, num_layers=0), "float32")[0]
        self._begin = jax.jit(lambda ends, tokens: nnx.merge(graph, ends).begin(tokens, jnp.arange(WINDOW), Context()))
        self._layer = jax.jit(lambda params, lora, *inputs: self.run_layer(params, Context(lora), *inputs))
        self._end = jax.jit(lambda ends, x: nnx.merge(graph, ends).logits(nnx.merge(graph, ends).end(x)))

    def run_layer(self, params: Params, context: Context, x: jax.Array, tables: Any) -> jax.Array:
        layer = nnx.merge(layer_graph(self.config, self.config.kind(0), "float32"), params)
        return layer(x, tables, context)

    def log_probabilities(self, tokens: np.ndarray, lora: list[Any] | None, layer: Any = None) -> jax.Array:
        """Returns float32 `[WINDOW, vocab]`. layer: replaces the call of each layer with its `lora`."""
        x, tables = self._begin(self._ends, tokens)
        for index in range(self.config.num_layers):
            x = (layer or self._layer)(self.params["layers"][index], None if lora is None else lora[index], x, tables)
        return jax.nn.log_softmax(self._end(self._ends, x), axis=-1)


def dense_lora(config: ModelConfig, adapter: LoraAdapter) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
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


@jax.jit
def compare(expected: jax.Array, found: jax.Array, targets: jax.Array) -> jax.Array:
    """Sums over a window's predictions: negative log-likelihood, KL divergence, equal most probable tokens."""
    expected, found = expected[:-1], found[:-1]
    nll = -jnp.take_along_axis(found, targets[:, None], 1).sum()
    kl = (jnp.exp(expected) * (expected - found)).sum()
    return jnp.stack([nll, kl, (expected.argmax(-1) == found.argmax(-1)).sum().astype(jnp.float32)])


def windows(path: Path) -> list[np.ndarray]:
    """Returns the text's windows, int32 `[WINDOW]` each, in the order of their use."""
    parts = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in ("results.md",))]
    texts = [part.read_text() for part in parts if part.name != "quantisation.md"]
    for file in sorted((ROOT / "experiments" / "adapters" / "data").glob("*.test.jsonl")):
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


def _key(weights: str | None, adapter: str | None) -> str:
    return f"{weights or 'float32'}/{adapter or 'base'}"


def rows(sums: Mapping[str, list[list[float]]]) -> Iterator[dict[str, Any]]:
    """Yields the measures of each format with each adapter, over the windows that all have."""
    count = min(map(len, sums.values()))
    predictions = count * (WINDOW - 1)
    for key, own in sums.items():
        weights, adapter = key.split("/")
        nll, kl, equal = np.sum(own[:count], axis=0)
        yield {
            "weights": weights,
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
        raise ConfigError(
            f"--output={output}: is of another text; the documents have changed. Remove it, or name another file"
        )
    sums: dict[str, list[list[float]]] = old["sums"]
    if count > len(text):
        raise ConfigError(f"--windows={count}: must be at most {len(text)}, all of the text")
    kinds: tuple[WeightFormat | None, ...] = (None, *formats)
    models = {weights: Model(path, weights) for weights in kinds}
    config = models[None].config
    geometry = adapter_geometry(config, 16)
    loras = {name: None if name is None else dense_lora(config, read_peft(ADAPTERS / name, geometry)) for name in NAMES}
    for index in tqdm(range(count), desc="windows"):
        tokens, targets = text[index], text[index][1:]
        for name, lora in loras.items():
            missing = [w for w in models if len(sums.setdefault(_key(w, name), [])) <= index]
            if not missing:
                continue
            expected = models[None].log_probabilities(tokens, lora)
            for weights in missing:
                found = expected if weights is None else models[weights].log_probabilities(tokens, lora)
                sums[_key(weights, name)].append([float(v) for v in compare(expected, found, targets)])
        _write(output, path, sums, digest)


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
    ours = {w: np.asarray(Model(path, w).log_probabilities(tokens, None)) for w in kinds}

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return round(float((np.exp(p[:-1]) * (p[:-1] - q[:-1])).sum(-1).mean()), 5)

    content = json.loads(output.read_text())
    content["verification"] = {
        "unquantised": kl(expected, ours[None]),
        "plain_in_transformers": kl(expected, plain),
        "int4": kl(ours[None], ours["int4"]),
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
