"""A compile report as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slora_jax.analysis.report import CompileReport, PoolReport, ProgramReport


def report_table(report: CompileReport) -> str:
    """Formats the pool, one line per program, then the programs' kernels and collectives."""
    layers = f"{report.layers} layers"
    if report.compiled_layers != report.layers:
        layers = f"ONLY {report.compiled_layers} of {layers} compiled; programs' bytes are for these"
    target = report.target
    if report.tensor_parallel_size > 1:
        target = (
            f"{report.tensor_parallel_size} x {target} (bytes are one device's), adapters cut as {report.tp_lora!r}"
        )
    formats = [report.dtype, *([f"{report.weights} weights"] if report.weights else [])]
    formats += [f"{report.kv_dtype} keys and values"] if report.kv_dtype != "auto" else []
    head = f"{target}, {', '.join(formats)}, ranks up to {report.max_lora_rank}, {layers}"
    lines = [head, *_pool(report.pool), ""]
    lines += _columns(
        (
            "program",
            "tokens",
            "seqs",
            "compile s",
            "arguments",
            "temporaries",
            "outputs",
            "in place",
            "pool",
            "launches",
        ),
        [
            (
                p.name,
                f"{p.tokens}",
                f"{p.seqs}",
                f"{p.compile_seconds:.1f}",
                _size(p.argument_bytes),
                _size(p.temp_bytes),
                _size(p.output_bytes),
                _size(p.aliased_bytes),
                _size(p.pool_bytes),
                f"{p.launches}",
            )
            for p in report.programs
        ],
    )
    kernels = [row for program in report.programs for row in _kernels(program)]
    if kernels:
        lines += ["", *_columns(("kernels of", "", "launches", "registers", "spills", "shared"), kernels, left=2)]
    else:
        lines += ["", "no custom kernels"]
    sent = [
        (
            p.name,
            f"{c.kind} ({c.purpose})" if c.purpose else c.kind,
            f"{c.count}",
            _size(c.bytes),
            _size(c.count * c.bytes),
        )
        for p in report.programs
        for c in p.collectives
    ]
    if sent:
        lines += ["", *_columns(("collectives of", "", "count", "each", "together"), sent, left=2)]
    return "\n".join(lines)


def _pool(pool: PoolReport) -> Iterator[str]:
    yield (
        f"memory: {_size(pool.memory_bytes)}, of it {pool.gpu_memory_fraction:.0%} for JAX: weights "
        f"{_size(pool.weight_bytes)}, temporaries and results {_size(pool.temp_bytes)}, "
        f"tables {_size(pool.other_bytes)}; of the rest {pool.gpu_memory_utilization:.0%} for the pool"
    )
    if not pool.num_pages:
        yield "pool: DOES NOT FIT: nothing is left for it"
        return
    verdict = "" if pool.fits else "; DOES NOT FIT one sequence of the greatest length"
    yield (
        f"pool: {pool.num_pages} pages of {pool.page_size} tokens ({_size(pool.page_bytes)} each), "
        f"{_size(pool.bytes)}: {pool.tokens} tokens, or {pool.adapters} adapters of rank {pool.adapter_rank} "
        f"({pool.adapter_pages} pages each){verdict}"
    )


def _kernels(program: ProgramReport) -> Iterator[tuple[str, ...]]:
    for kernel in program.kernels:
        yield (
            program.name,
            f"{kernel.name} ({kernel.backend})",
            f"{kernel.count}",
            f"{kernel.registers}",
            f"{kernel.spill_bytes} B",
            _size(kernel.shared_bytes),
        )


def _columns(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
    """Aligns columns, the first `left` to the left. A first cell equal to the one above is left empty."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines, above = [], ""
    for row in (head, *rows):
        first = "" if row[0] == above else row[0]
        cells = [
            f"{c:<{w}}" if i < left else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip((first, *row[1:]), widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        above = row[0]
    return lines


def _size(count: int) -> str:
    """Formats bytes in the unit with at most four digits before the point."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
