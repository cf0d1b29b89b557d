"""What a compiled program sends between devices."""

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
    """kind: the HLO opcode. count: how often a run of the program does it. bytes: of one, on one device: of what goes
    in or of what comes out, whichever is more. purpose: what the program calls it, by a scope `all_reduce_<purpose>` or
    `all_gather_<purpose>` ("" if it does not)."""

    kind: str
    count: int
    bytes: int
    purpose: str = ""


def collectives_in(compiled: Any) -> list[Collective]:
    """The collectives of a compiled program, by kind, size and purpose, largest first within a kind. A loop's body
    counts once where the compiler does not know its trip count."""
    program = instructions(compiled.as_text())
    types = {i.name: i.type for i in program}
    for instruction in program:  # of a started one, the result is what its end yields
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
