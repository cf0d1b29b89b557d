"""Draws the unified pool of a running engine: `python -m experiments.pool_picture [--output docs/pool.png]`.

Left: every page at one busy moment, coloured by its kind. Right: pages by kind, step by step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from slora_jax import Delta, Engine, EngineConfig, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.memory import PageKind
from slora_jax.models import ModelConfig, RopeConfig, init_random

KINDS = ("free", "KV of one request", "prefix in use", "prefix idle", "adapter in use", "adapter idle", "dummy page")
COLOURS = ("#eef0f2", "#3b7dd8", "#2b9c8f", "#a9dcd3", "#e8743b", "#f3c9a5", "#444444")
FREE, KV, PREFIX_IN_USE, PREFIX_IDLE, IN_USE, IDLE, DUMMY = range(7)
STACKED = (KV, PREFIX_IN_USE, IN_USE, PREFIX_IDLE, IDLE, FREE)


def page_kinds(engine: Engine) -> np.ndarray:
    """Returns the present kind of each page: indices into `KINDS`, `[num_pages]`."""
    kinds = np.full(engine.allocator.num_pages, FREE)
    kinds[0] = DUMMY
    kinds[engine.allocator.kinds == PageKind.PREFIX] = PREFIX_IDLE
    for request in engine.scheduler.running:
        kinds[request.pages[: request.num_shared]] = PREFIX_IN_USE
        kinds[request.pages[request.num_shared :]] = KV
    for resident in engine.residency.residents:
        kinds[resident.pages] = IN_USE if resident.digest in engine.residency.users else IDLE
    return kinds


def tiny_engine(seed: int = 0, **settings: Any) -> Engine:
    """Makes an engine with a tiny random model and 60 adapters of ranks 4 to 32, named adapter-0 to adapter-59."""
    model = ModelConfig(
        family="llama", vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=16, rope=RopeConfig(theta=10000.0), rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=512,
    )  # fmt: skip
    config = EngineConfig(
        dtype="float32", num_pages=300, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=256, max_lora_rank=32,
        decode_buckets=(16,), mixed_buckets=(64,), progress=False, **settings,
    )  # fmt: skip
    graphdef, params = init_random(model, "float32", seed)
    engine = Engine(model, graphdef, params, config)
    for i in range(60):
        rank = (4, 8, 16, 32)[i % 4]
        engine.load_adapter(f"adapter-{i}", random_adapter(engine.store.geometry, rank, ("q", "k", "v", "o"), seed=i))
    return engine


def serve(engine: Engine, seed: int = 0) -> Iterator[list[Delta]]:
    """Serves 160 requests over the adapters, which arrive over 400 steps; yields the new tokens of each step. All
    prompts for an adapter begin with the same 32 tokens, its instructions."""
    rng = np.random.default_rng(seed)
    instructions = rng.integers(0, 256, (60, 32)).tolist()
    arrivals = sorted(rng.integers(0, 400, 160).tolist())
    step = 0
    while arrivals or engine.has_work():
        while arrivals and arrivals[0] <= step:
            arrivals.pop(0)
            adapter = int(60 * rng.power(0.5))
            prompt = instructions[adapter] + rng.integers(0, 256, rng.integers(8, 88)).tolist()
            params = SamplingParams(max_tokens=int(rng.integers(16, 96)), ignore_eos=True)
            engine.add_request(prompt, params, f"adapter-{adapter}")
        yield engine.step()
        step += 1


def run(seed: int = 0) -> Iterator[np.ndarray]:
    """Yields `page_kinds` after each step of `serve`."""
    with tiny_engine(seed) as engine:
        for _ in serve(engine, seed):
            yield page_kinds(engine)


def draw_pages(axes: Axes, kinds: np.ndarray, columns: int = 25) -> None:
    """Draws every page as a square, row by row from page 0 at the top left. kinds: of `page_kinds`."""
    grid = np.full(-(-kinds.size // columns) * columns, FREE)
    grid[: kinds.size] = kinds
    colours = ListedColormap(COLOURS)
    axes.pcolormesh(grid.reshape(-1, columns), cmap=colours, vmin=-0.5, vmax=6.5, edgecolors="white", lw=0.8)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.axis("off")


def draw_history(axes: Axes, history: Sequence[np.ndarray]) -> None:
    """Draws the pages by kind, stacked, step by step. history: `page_kinds` after each step."""
    counts = np.stack([[(kinds == kind).sum() for kinds in history] for kind in STACKED])
    axes.stackplot(range(len(history)), counts, colors=[COLOURS[k] for k in STACKED])
    axes.set(xlabel="step", ylabel="pages", xlim=(0, len(history) - 1), ylim=(0, history[0].size - 1))
    axes.spines[["top", "right"]].set_visible(False)


def draw_legend(figure: Figure, ncols: int = len(KINDS)) -> None:
    """Draws a legend of the colours below everything."""
    handles = [Patch(color=colour, label=kind) for kind, colour in zip(KINDS, COLOURS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)


def draw(history: list[np.ndarray], output: Path) -> None:
    """Writes the picture: the fullest moment of `history`, and all of it over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.25), layout="constrained")
    draw_pages(left, max(history, key=lambda kinds: np.isin(kinds, (KV, PREFIX_IN_USE, IN_USE)).sum()))
    left.set_title("Every page at one busy moment")
    draw_history(right, history)
    right.set_title("The same pool over time")
    draw_legend(figure)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pool.png"))
    args = parser.parse_args()
    plt.switch_backend("Agg")
    draw(list(run()), args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
