"""Instructions that a kernel executes: those of its machine code, times the iterations of their loops."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from slora_jax.analysis.ptxas import architecture, ptxas
from slora_jax.errors import ConfigError

_LABEL = re.compile(r"^\s*(\.L\w*):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L\w*)\)")


@dataclass
class Block:
    """A basic block: its opcodes in order, and the indices of the blocks that may follow."""

    opcodes: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A natural loop: the index of its first block, and the indices of all of its blocks."""

    header: int
    blocks: frozenset[int]


def executed(ptx: str, iterations: Sequence[int]) -> Counter[str]:
    """Counts the instructions that one warp executes, by opcode. Both sides of a branch count.

    Args:
      ptx: one kernel's.
      iterations: of each loop of `loops(ptx)`, in order; an inner loop's per iteration of the outer one.

    Raises:
      ConfigError: the assembler or the disassembler is not installed, or fails.
      ValueError: the kernel has another number of loops.
    """
    blocks, found = _blocks(ptx), loops(ptx)
    if len(found) != len(iterations):
        raise ValueError(f"iterations={tuple(iterations)}: the kernel has {len(found)} loops; give one number for each")
    counts = Counter[str]()
    for index in _reachable(blocks):
        times = 1
        for loop, count in zip(found, iterations, strict=True):
            times *= count if index in loop.blocks else 1
        for opcode in blocks[index].opcodes:
            counts[opcode] += times
    return counts


def loops(ptx: str) -> list[Loop]:
    """Returns the loops of a kernel in the order of their first instructions, so an outer one before its inner ones."""
    blocks = _blocks(ptx)
    dominators = _dominators(blocks)
    bodies: dict[int, set[int]] = {}
    for tail in dominators:
        for header in blocks[tail].successors:
            if header in dominators[tail]:
                bodies.setdefault(header, {header}).update(_body(blocks, header, tail))
    return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]


@cache
def _blocks(ptx: str) -> list[Block]:
    return _parse(disassemble(ptx))


def disassemble(ptx: str) -> str:
    """Assembles PTX and returns its machine code as `nvdisasm -c` prints it."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        _run(str(ptxas()), f"-arch={architecture(ptx)}", str(source), "-o", str(binary))
        return _run(str(_nvdisasm()), "-c", str(binary))


def _nvdisasm() -> Path:
    """The disassembler that Triton's wheel has, or the one on PATH."""
    package = find_spec("triton")
    for root in (package.submodule_search_locations or ()) if package else ():
        if (path := Path(root) / "backends" / "nvidia" / "bin" / "nvdisasm").exists():
            return path
    if found := shutil.which("nvdisasm"):
        return Path(found)
    raise ConfigError("nvdisasm, which prints machine code, is not installed: make install EXTRAS=cuda12")


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ConfigError(f"{command[0]} failed: {result.stderr.strip()[:2000]}")
    return result.stdout


def _parse(text: str) -> list[Block]:
    """Splits the machine code into basic blocks; the first is the entry."""
    labels: dict[str, int] = {}
    blocks, jumps = [Block()], list[tuple[int, str]]()
    ended = False  # the last block cannot be continued
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].opcodes:
                if not ended:
                    blocks[-1].successors.append(len(blocks))
                blocks.append(Block())
                ended = False
            labels[label[1]] = len(blocks) - 1
        elif instruction := _INSTRUCTION.match(line):
            predicate, opcode, operands = instruction.groups()
            if ended:
                blocks.append(Block())
            block = blocks[-1]
            block.opcodes.append(opcode)
            target = _TARGET.search(operands)
            branches = opcode.split(".")[0] == "BRA" and target is not None
            if branches:
                jumps.append((len(blocks) - 1, target[1]))  # type: ignore[index]
            conditional = predicate is not None or (branches and not operands.startswith("`"))
            ended = (branches or opcode in ("EXIT", "RET")) and not conditional
            if branches and conditional:
                block.successors.append(len(blocks))
                blocks.append(Block())
    for index, name in jumps:
        blocks[index].successors.append(labels[name])
    return blocks


def _reachable(blocks: list[Block]) -> set[int]:
    seen, todo = {0}, [0]
    while todo:
        for successor in blocks[todo.pop()].successors:
            if successor not in seen:
                seen.add(successor)
                todo.append(successor)
    return seen


def _predecessors(blocks: list[Block], index: int) -> Iterator[int]:
    return (i for i, block in enumerate(blocks) if index in block.successors)


def _dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """The blocks through which every path from the entry to each reachable block goes."""
    reachable = _reachable(blocks)
    before = {i: [p for p in _predecessors(blocks, i) if p in reachable] for i in reachable}
    result = {i: set(reachable) for i in reachable} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for i in sorted(reachable - {0}):
            new = set.intersection(*(result[p] for p in before[i])) | {i}
            if new != result[i]:
                result[i], changed = new, True
    return result


def _body(blocks: list[Block], header: int, tail: int) -> set[int]:
    """Blocks of the natural loop of the edge from `tail` back to `header`."""
    body, todo = {header, tail}, [tail]
    while todo:
        index = todo.pop()
        if index != header:
            for before in _predecessors(blocks, index):
                if before not in body:
                    body.add(before)
                    todo.append(before)
    return body
