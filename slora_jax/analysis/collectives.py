"""Collectives of a compiled program."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from slora_jax.analysis.hlo import Instruction, array_bytes, instructions

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_PURPOSE = re.compile(r'op_name="[^"]*\ball_(?:reduce|gather)_([a-z]+)')


@dataclass(frozen=True)
class Collective:
    """One kind of collective.

    Attributes:
      kind: the HLO opcode.
      count: executions per run of the program.
      bytes: of one execution on one device: the larger of its input and output.
      purpose: from a scope `all_reduce_<purpose>` or `all_gather_<purpose>`; "" without such a scope.
    """

    kind: str
    count: int
    bytes: int
    purpose: str = ""


def collectives_in(compiled: Any) -> list[Collective]:
    """Returns the collectives of a compiled program, by kind, size and purpose, largest first within a kind. The body
    of a loop with an unknown trip count counts once."""
    program = instructions(compiled.as_text())
    types = {i.name: i.type for i in program}
    for instruction in program:  # the result of a `-start` is that of its `-done`
        if instruction.opcode.endswith("-done"):
            types[_operands(instruction)[0]] = instruction.type
    found = Counter[tuple[str, int, str]]()
    for instruction in program:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            taken = sum(array_bytes(types[name]) for name in _operands(instruction))
            purpose = _PURPOSE.search(instruction.rest)
            size = max(taken, array_bytes(types[instruction.name]))
            found[kind, size, purpose[1] if purpose else ""] += instruction.times
    order = sorted(found, key=lambda key: (KINDS.index(key[0]), -key[1], key[2]))
    return [Collective(kind, found[kind, size, purpose], size, purpose) for kind, size, purpose in order]


def _operands(instruction: Instruction) -> list[str]:
    given = instruction.rest[: instruction.rest.index(")")]
    return [name.strip().removeprefix("%") for name in given.split(",")]
