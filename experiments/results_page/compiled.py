"""Sections on what the compiler makes for GPUs, and on the times predicted from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.results_page.section import Json
from experiments.results_page.table import gigabytes, listed, percent, pick, table


def programs(*reports: Json) -> Iterable[str]:
    yield (
        f"The step programs of Llama-3-8B, {reports[0]['dtype']}, ranks up to {reports[0]['max_lora_rank']}, compiled "
        "without a GPU. *Launches*: of the whole step. *Kernels*: of one layer. *Registers*: of the largest shrink, "
        "expand and attention kernel. A100 and L4 take `--max-num-batched-tokens 1024 --max-num-seqs 64 "
        "--gpu-memory-fraction 0.92`; `--programs` selected the ones shown."
    )
    yield table(
        "GPU | program | rows | temporaries | outputs | launches | kernels | registers | spilled bytes | "
        "pool updated in place",
        [_program(r["target"].upper(), program) for r in reports for program in r["programs"] if program["kernels"]],
    )
    yield from _pools("GPU", {report["target"].upper(): report for report in reports})


def families(*reports: Json) -> Iterable[str]:
    models = dict(zip(("Phi-4", "Gemma 3 12B", "Qwen3-30B-A3B"), reports, strict=True))
    layers = [f"{report['compiled_layers']} of {name}'s {report['layers']} layers" for name, report in models.items()]
    yield (
        f"The largest step programs of other families for an {reports[0]['target'].upper()}, {reports[0]['dtype']}, "
        f"ranks up to {reports[0]['max_lora_rank']}: `--programs decode_256_lora,mixed_2048_lora`, and `--layers` for "
        f"{listed(layers)}. *Launches*: of the compiled layers. *Kernels*: of a layer of each kind."
    )
    yield table(
        "model | program | rows | temporaries | outputs | launches | kernels | registers | spilled bytes | "
        "pool updated in place",
        [_program(name, program) for name, report in models.items() for program in report["programs"]],
    )
    yield from _pools("model", models)


def _pools(of: str, reports: Mapping[str, Json]) -> Iterable[str]:
    """The contents of a pool for all layers of the model."""
    yield "What the pool holds, beside the weights:"
    rows = []
    for name, report in reports.items():
        pool = report["pool"]
        sizes = map(gigabytes, pick(pool, "memory_bytes weight_bytes"))
        adapters = f"{pool['adapters']:,} of rank {pool['adapter_rank']}"
        rows.append([name, *sizes, *pick(pool, "num_pages tokens"), adapters])
    yield table(f"{of} | memory | weights | pages | tokens of KV | or adapters", rows)


def _program(name: str, program: Json) -> list[Any]:
    kernels, registers = program["kernels"], []
    kinds = {"lora": "LoRA", "paged": "attention", "expert": "experts"}
    counts = Counter(kinds.get(kernel["name"].partition("_")[0], "other") for kernel in kernels)
    for kind in ("shrink", "expand", "attention"):
        registers += sorted(kernel["registers"] for kernel in kernels if kind in kernel["name"])[-1:]
    return [
        name,
        f"`{program['name']}`",
        program["tokens"],
        *(f"{size / 1e6:.1f} MB" for size in pick(program, "temp_bytes output_bytes")),
        program["launches"],
        " + ".join(f"{count} {kind}" for kind, count in counts.items()),
        listed(registers),
        sum(kernel["spill_bytes"] for kernel in kernels),
        not program["copies"] and program["aliased_bytes"] >= program["pool_bytes"],
    ]


KERNEL_NUMBERS = {
    "registers": "registers",
    "instructions_per_kb": "instructions per KiB",
    "launches": "launches",
    "blocks": "blocks",
    "dead_blocks": "without work",
    "waves": "waves",
    "compare_and_swaps": "compare-and-swaps",
    "temp_bytes": "temporary bytes",
    "is_sequential": "a chain",
}
"""Columns of the tables of compiled kernels, and their titles."""


def kernels(rows: list[Json]) -> Iterable[str]:
    yield (
        "Read from the code that the compiler makes for an H200, for Llama-3-8B; *before* is the kernels' first "
        "version. *Instructions*: of a warp, per KiB of weights that the kernel reads; all of a program's count. "
        "*Waves*: items over the programs that are resident at once. *A chain*: each kernel of the graph waits for the "
        "one before."
    )
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel and row["version"] != "predicted"]
        names = [name for name in KERNEL_NUMBERS if any(row.get(name) is not None for row in own)]
        cases = {(row["case"], row["version"]): row for row in own}
        yield f"### `{kernel}`"
        yield table(
            " | ".join(["case", *(f"{KERNEL_NUMBERS[name]}, before | now" for name in names)]),
            [
                [case, *(cases[case, version].get(name) for name in names for version in ("old", "new"))]
                for case in dict.fromkeys(case for case, _ in cases)
            ],
        )


PREDICTED = (
    "model=llama-3-8b (rows=(64|4096) adapters=64 rank=16$|rows=4096 sequences=|batch=64 context=(512|4096)|prompts=)"
    "|^sampler"
)
"""Labels of the cases of which the page shows the prediction."""


def predicted(data: Json) -> Iterable[str]:
    bandwidth, products = pick(data, "assumed.copy_share assumed.matmul_share")
    yield (
        "What an H200 should show, predicted before any measurement. *Floor*: bytes and operations at the assumed "
        f"rates, {percent(bandwidth)} of the data sheet's bandwidth and {percent(products)} of its matrix rate. The "
        "LoRA and attention cases are one layer's calls; a step is the whole model's."
    )
    yield table(
        "case | system | floor (µs) | predicted (µs) | bound",
        [
            [
                row["label"],
                row["system"],
                *(1e6 * s for s in pick(row, "floor_seconds predicted_seconds")),
                row["bound"],
            ]
            for row in data["rows"]
            if re.search(PREDICTED, row["label"])
        ],
    )


def parallel(data: Json) -> Iterable[str]:
    rank, share = pick(data, "config.max_lora_rank config.gpu_memory_fraction")
    yield (
        f"Large models over several {data['target'].upper()}s, compiled without a GPU: ranks up to {rank}, {share:.0%} "
        "of the memory. `llama-30b` and `llama-70b` are the paper's shapes. *As published*: the compiled collectives "
        "are those of the paper's formula, to the byte."
    )
    rows = []
    for row in data["rows"]:
        programs = row["programs"]
        model, devices, weights, *pool = pick(row, "model tensor_parallel_size weight_bytes pages tokens")
        adapters = " / ".join(f"{count:,}" for count in row["adapters"].values())
        found = [
            all(p["as_published"] for p in programs),
            *(sum(p[n] for p in programs) for n in ("spills", "pool_copies")),
        ]
        layers = f"{row['compiled_layers']} of {row['layers']}"
        rows.append([model, devices, gigabytes(weights), *pool, adapters, layers, *found])
    columns = "layers compiled | collectives as published | spilled bytes | pool copies"
    ranks = " / ".join(data["rows"][0]["adapters"])
    yield table(
        f"model | GPUs | weights per GPU | pages | tokens of KV | or adapters of rank {ranks} | {columns}", rows
    )
