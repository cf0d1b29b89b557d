"""The paper's Figure 8, simulated: what tensor parallelism costs S-LoRA. `python -m experiments.figure_8`.

Each published group of bars is simulated with the published system over as many devices: S-LoRA, S-LoRA whose adapters
send nothing in no time, and the base model alone; beside them the two other ways to cut adapters, A of q, k, v and B of
o whole on every device (vLLM's default), and all of A by input. Nothing is fitted to these values.

What the paper does not say is assumed: the synthetic workload of its Table 3 (alpha 1, cv 1, 8 to 511 tokens either
way, 10 requests a second for 120 s: more than any bar can serve); a pool that fills the same share of a device's memory
as in the published runs of one device; NVLink between all devices.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any

from experiments.machine import provenance
from experiments.paper.arguments import pool_tokens
from experiments.paper.figure_8 import FIGURE_8, Figure8Point
from experiments.paper.settings import SETTINGS
from experiments.simulated_rows import requests
from experiments.workloads import synthetic
from slora_jax.metrics import serving_metrics
from slora_jax.models import ModelConfig
from slora_jax.models.config import read_json
from slora_jax.simulation import DeviceModel, ModelShape, SystemConfig, load_device, make_system, simulate

RESULTS = Path(__file__).parent / "results" / "simulator"
SINGLE = "S4"
"""The setting whose published runs on one device tell how much of its memory was used."""


@dataclass(frozen=True)
class Variant:
    """A bar. published: its field of `Figure8Point`, or None."""

    name: str
    system: str
    settings: Mapping[str, Any]
    published: str | None = None


VARIANTS = (
    Variant("S-LoRA", "slora-paper", {}, "slora"),
    Variant("no LoRA communication", "slora-paper", {"lora_collectives": False}, "without_lora_communication"),
    Variant("base only", "base-paper", {}, "base"),
    Variant("A1, B2 replicated", "slora-paper", {"tp_lora": "replicated"}),
    Variant("A cut by input", "slora-paper", {"tp_lora": "sharded_in"}),
)


@dataclass(frozen=True)
class Load:
    """The synthetic workload's rate in requests per second, and its duration in seconds."""

    rate: float = 10.0
    duration: float = 120.0


@dataclass(frozen=True)
class Bar:
    """Requests per second, published (None: not) and simulated. num_tokens: capacity of the pool."""

    variant: str
    published: float | None
    simulated: float
    num_tokens: int

    @property
    def error(self) -> float | None:
        """Relative."""
        return None if self.published is None else self.simulated / self.published - 1


def simulated_throughput(
    device: DeviceModel, model: ModelShape, system: SystemConfig, ranks: Sequence[int], num_adapters: int, load: Load
) -> float:
    """Requests per second of `system` (its `tp` devices) under the synthetic workload, as the paper counts them:
    completed requests over the whole time, to the last one's end."""
    work = synthetic(num_adapters, load.rate, load.duration, ranks)
    result = simulate(requests(work), system, model, device, work.ranks)
    return serving_metrics(result.records, start=0.0).throughput


def variant_system(variant: Variant, device: str, tp: int) -> SystemConfig:
    """The system of a bar on `tp` devices of a published kind."""
    return make_system(variant.system, tp=tp, memory_fraction=memory_share(device), **variant.settings)


@cache
def memory_share(device: str) -> float:
    """Of a device's memory, what weights and pool took in the published runs on one."""
    shape = _shape(SINGLE)
    used = shape.weight_bytes + pool_tokens(device, SINGLE) * shape.kv_bytes
    return used / load_device(device).memory_bytes


@cache
def _shape(setting: str) -> ModelShape:
    return ModelShape.of(ModelConfig.from_dict(read_json(SETTINGS[setting].model_file)))


def bars(point: Figure8Point, load: Load, device: DeviceModel | None = None) -> list[Bar]:
    """All variants of a published group, on its device as its file has it or on the one given."""
    device = device or load_device(point.device)
    model, ranks = _shape(point.setting), SETTINGS[point.setting].ranks
    made = []
    for variant in VARIANTS:
        system = variant_system(variant, point.device, point.tp)
        throughput = simulated_throughput(device, model, system, ranks, point.num_adapters, load)
        published = None if variant.published is None else getattr(point, variant.published)
        made.append(Bar(variant.name, published, throughput, system.pool_tokens(model, device)))
    return made


def label(point: Figure8Point) -> str:
    model = SETTINGS[point.setting].model.removeprefix("llama-").removesuffix(".json").upper()
    return f"{model}, {point.tp} x {point.device.upper()}, n={point.num_adapters}"


def table(groups: Mapping[Figure8Point, Sequence[Bar]]) -> str:
    """Markdown: simulated (published, error) of every bar."""
    lines = ["| | pool tokens | " + " | ".join(v.name for v in VARIANTS) + " |", "|" + "---|" * (len(VARIANTS) + 2)]
    for point, made in groups.items():
        cells = [
            f"{bar.simulated:.2f}" if bar.error is None else f"{bar.simulated:.2f} ({bar.published}, {bar.error:+.0%})"
            for bar in made
        ]
        lines.append(f"| {label(point)} | {made[0].num_tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(groups: Mapping[Figure8Point, Sequence[Bar]]) -> dict[str, float]:
    """Mean absolute relative error of the published variants, and the geometric mean of S-LoRA's throughput over that
    of each other variant, published and simulated."""
    found: dict[str, float] = {}
    for index, variant in enumerate(VARIANTS):
        errors = [abs(made[index].error or 0.0) for made in groups.values()]
        if variant.published is not None:
            found[f"mean error, {variant.name}"] = sum(errors) / len(errors)
        if index:
            found[f"S-LoRA / {variant.name}, simulated"] = _mean_ratio(
                (made[0].simulated, made[index].simulated) for made in groups.values()
            )
        if index and variant.published is not None:
            found[f"S-LoRA / {variant.name}, published"] = _mean_ratio(
                (point.slora, getattr(point, variant.published)) for point in groups
            )
    return {name: round(value, 4) for name, value in found.items()}


def _mean_ratio(pairs: Iterable[tuple[float, float]]) -> float:
    logs = [math.log(one / other) for one, other in pairs]
    return math.exp(sum(logs) / len(logs))


def draw(groups: Mapping[Figure8Point, Sequence[Bar]], file: Path) -> None:
    """Writes a PNG: a plot for every group, the published bars beside the simulated ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, (len(groups) + 1) // 2, figsize=(12, 7), squeeze=False)
    names = [fill(variant.name, 14) for variant in VARIANTS]
    for ax, (point, made) in zip(axes.flat, groups.items(), strict=False):
        published = [bar.published or 0.0 for bar in made]
        where = range(len(made))
        one = ax.bar([x - 0.2 for x in where], published, 0.4, color="tab:gray", label="published")
        other = ax.bar([x + 0.2 for x in where], [bar.simulated for bar in made], 0.4, label="simulated")
        ax.bar_label(one, [f"{value:.2f}" if value else "" for value in published], fontsize=7)
        ax.bar_label(other, fmt="%.2f", fontsize=7)
        ax.set_xticks(list(where), names, fontsize=7)
        ax.set_title(label(point), fontsize=10)
        ax.margins(y=0.12)
    for row in axes:
        row[0].set_ylabel("throughput (requests/s)")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    fig.suptitle("Figure 8: tensor parallelism (nothing fitted to it)")
    fig.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=Load.rate, help="requests per second (default: %(default)s)")
    parser.add_argument("--duration", type=float, default=Load.duration, help="seconds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of figure_8.json and figure_8.png")
    args = parser.parse_args()
    load = Load(args.rate, args.duration)
    groups = {point: bars(point, load) for point in FIGURE_8}
    content: dict[str, Any] = {
        "command": " ".join(["python -m experiments.figure_8", *sys.argv[1:]]),
        **provenance(("numpy",)),
        "assumed": {
            "workload": f"synthetic, alpha=1, cv=1, lengths [8, 512), R={load.rate:g}, D={load.duration:g} s",
            "memory_share": {name: round(memory_share(name), 4) for name in sorted({p.device for p in FIGURE_8})},
            "link_bandwidth, one way": {p.device: load_device(p.device).link_bandwidth for p in FIGURE_8},
        },
        "summary": summary(groups),
        "groups": [
            {
                **{name: value for name, value in asdict(point).items() if name in ("setting", "device", "tp")},
                "num_adapters": point.num_adapters,
                "bars": [{**asdict(bar), "error": bar.error} for bar in made],
            }
            for point, made in groups.items()
        ],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "figure_8.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(groups, args.out / "figure_8.png")
    print(table(groups))
    for name, value in content["summary"].items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
