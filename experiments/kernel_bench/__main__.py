"""Measures every op, and whole decode steps, against their rooflines: `python -m experiments.kernel_bench`."""

from __future__ import annotations

import sys

from pallas_kernels.bench.__main__ import main
from pallas_kernels.bench.case import Section
from pallas_kernels.bench.size import Size


def step_section(size: Size, seed: int) -> Section:
    """The cases of whole decode steps; JAX is imported with them, after the command has set its environment."""
    from experiments.kernel_bench import step

    return step.section(size, seed)


if __name__ == "__main__":
    sys.exit(main(program="experiments.kernel_bench", more={"step": step_section}))
