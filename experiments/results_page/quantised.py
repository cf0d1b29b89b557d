"""The tables of docs/quantisation.md."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.results_page.paper import collect_results
from experiments.results_page.section import Json, Lines
from experiments.results_page.table import pick, table


def capacity(lines: Lines) -> Iterable[str]:
    panels = collect_results("beyond", "quantised", lines).panels
    rows = []
    for panel in panels:
        for curve in panel.curves:
            held = curve.points[0].metrics
            served = [point.metrics["throughput"] for point in curve.points]
            rows.append([panel.title, curve.name, held["pool_tokens"], held["pool_adapters"], *served])
    served_by = [f"requests/s with {count:,} adapters" for count in panels[0].places]
    yield table(" | ".join(["setting", "format", "tokens in the pool", "or adapters in it", *served_by]), rows)


def comet(data: Json) -> Iterable[str]:
    yield f"Model: {data['model']}, dequantised to float32, which is the reference; {data['tokens']:,} tokens."
    shares = [None if (share := row["share_of_4_bits"]) is None else f"{share:.0%}" for row in data["rows"]]
    yield table(
        "rounded | blocks of 4 bits | perplexity | KL, nats per token | agreement",
        [
            [row["format"], share, *pick(row, "perplexity kl"), f"{row['agreement']:.1%}"]
            for row, share in zip(data["rows"], shares, strict=True)
        ],
    )
