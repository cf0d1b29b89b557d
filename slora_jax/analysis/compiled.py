"""Reads how a compiled program uses the pool, and its PTX."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from pallas_kernels.targets import Target, compile_for
from slora_jax.memory import PoolShape

_HLO_TYPES = {"float32": "f32", "bfloat16": "bf16", "uint16": "u16"}


@dataclass(frozen=True)
class PoolUse:
    """Memory of a compiled step.

    Attributes:
      pool_bytes: the whole pool.
      aliased_bytes: all donated arguments (pool and sequence state).
      temp_bytes: the program's temporaries.
      copies: HLO lines that copy a layer's pool or allocate another.
    """

    pool_bytes: int
    aliased_bytes: int
    temp_bytes: int
    copies: tuple[str, ...]


def pool_use(compiled: Any, shape: PoolShape) -> PoolUse:
    """Reads a compiled step's memory analysis and its optimised HLO."""
    memory = compiled.memory_analysis()
    return PoolUse(
        pool_bytes=shape.num_pages * shape.page_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        copies=tuple(_copies(compiled.as_text(), shape)),
    )


def _copies(hlo: str, shape: PoolShape) -> list[str]:
    """HLO lines that copy an array with the type and number of elements of one layer's pages or scales, in any shape:
    `copy`, `copy-start`, `transpose`, `concatenate`, `convert` or `pad`."""
    arrays = [(_HLO_TYPES[a.dtype.name], math.prod(a.shape)) for a in jax.tree.leaves(shape.pool_struct()[0])]
    made = re.compile(r"= \(?(\w+)\[([\d,]+)\]\S* (copy|copy-start|transpose|concatenate|convert|pad)\(")
    return [
        line.strip()
        for line in hlo.splitlines()
        if (match := made.search(line)) and (match[1], math.prod(int(n) for n in match[2].split(","))) in arrays
    ]


def compile_with_ptx(target: Target, function: Any, *shapes: Any) -> tuple[Any, str]:
    """Compiles as `compile_for` does. Also returns the PTX of XLA's own kernels, without that of custom kernels."""
    with TemporaryDirectory() as directory:
        compiled = compile_for(
            target, function, *shapes, options={"xla_dump_to": directory, "xla_dump_emitter_re": ".*"}
        )
        return compiled, "\n".join(path.read_text() for path in sorted(Path(directory).glob("*.ptx")))
