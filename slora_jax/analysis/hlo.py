"""The instructions of an HLO program, optimised or as lowered, read from its text, with their execution counts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

ITEM_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (8, 16, 32, 64)},
    **{f"f{bits}": bits for bits in (16, 32, 64)},
    **dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz", "f8e8m0fnu"), 8),
    "bf16": 16,
    "c64": 64,
    "c128": 128,
    "token": 0,
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([\w\-]+)\(")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%([\w.\-]+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


_ON_THE_HOST = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call"),
}
"""Opcodes that launch nothing, besides the ends of asynchronous operations."""


@dataclass(frozen=True)
class Instruction:
    """One HLO instruction.

    Attributes:
      type: HLO type of the result.
      rest: the text from the operands on.
      times: executions per run of the program. Every branch counts, and the body of a loop with an unknown trip count
        counts once.
    """

    name: str
    type: str
    opcode: str
    rest: str
    times: int


def instructions(text: str, fused: bool = True) -> list[Instruction]:
    """Returns every instruction of the program (`compiled.as_text()`, `lowered.as_text("hlo")`), including those of
    called computations.

    With `fused=False`, without the insides of fusions and reductions, and without the conditions of loops with a known
    trip count, which are not evaluated.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if (match := _COMPUTATION.match(line)) is not None:
            body = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif (match := _INSTRUCTION.match(line)) is not None:
            body.append(_parse(match[1], line[match.end() :]))
    times = Counter[str]()
    _count(entry, 1, computations, times, fused)
    return [
        Instruction(i.name, i.type, i.opcode, i.rest, times[name])
        for name, body in computations.items()
        for i in body
        if times[name]
    ]


def launches(text: str) -> int:
    """Returns the number of kernels, copies and library calls that one run of the program launches on a GPU."""
    return sum(
        i.times
        for i in instructions(text, fused=False)
        if i.opcode not in _ON_THE_HOST and not i.opcode.endswith(("-done", "-update"))
    )


def array_bytes(type_: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, by its HLO type."""
    bits = 0
    for kind, dims in _ARRAY.findall(type_):
        size = ITEM_BITS[kind]
        for dim in dims.split(",") if dims else ():
            size *= int(dim)
        bits += size
    return bits // 8


def _parse(name: str, definition: str) -> Instruction:
    """`definition` is what follows ` = `: a type, an opcode, operands in parentheses, attributes."""
    end = _closing(definition) if definition.startswith("(") else 0
    match = _OPCODE.search(definition, end)
    if match is None:
        raise ValueError(f"no opcode in the definition of {name}: {definition[:200]}")
    return Instruction(name, definition[: match.start()], match[1], definition[match.end() :], 0)


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _count(name: str, times: int, computations: dict[str, list[Instruction]], total: Counter[str], fused: bool) -> None:
    """Adds `times` runs of a computation and of its callees."""
    total[name] += times
    for instruction in computations[name]:
        if instruction.opcode in ("custom-call", "constant", "parameter"):
            continue  # without callees, and possibly very long
        if not fused and instruction.opcode not in ("while", "conditional", "call", "async-start"):
            continue
        rest = instruction.rest
        called = _CALLED.findall(rest)
        for names in _CALLED_LIST.findall(rest):
            called += [n.strip().removeprefix("%") for n in names.split(",")]
        trips = _TRIP_COUNT.search(rest) if instruction.opcode == "while" else None
        skipped = _CONDITION.search(rest) if trips and not fused else None
        for callee in called:
            if callee in computations and not (skipped and callee == skipped[1]):
                _count(callee, times * (int(trips[1]) if trips else 1), computations, total, fused)
