"""What is measured: cases, the systems that compete in them, and the programs these run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.roofline import Work

Dispatch = Callable[[], Any]
"""Runs a program once, asynchronously; returns the arrays to wait for."""


@dataclass(frozen=True, eq=False)
class Program:
    """A jitted function and how to find the shapes of its arguments. Systems of several cases may share one; the name
    is unique.

    Finding the shapes and tracing raise NotImplementedError where a backend does not take part.
    """

    name: str
    function: Any
    shapes: Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class System:
    """One way of doing a case's work.

    program: what is compiled for it; None: nothing. start: puts the arguments on the device and gives the dispatch;
    called with the compiled program. repeats: how often one dispatch does the work. skip: why it is not measured.
    work: its own, where the systems of a case differ. over: another system of the case, whose measured time belongs to
    this one's floor: `work` is what it does beyond that.
    """

    name: str
    program: Program | None = None
    start: Callable[[Any], Dispatch] | None = None
    repeats: int = 1
    skip: str = ""
    work: Work | None = None
    over: str = ""


@dataclass(frozen=True)
class Case:
    """Work of one shape.

    op, regime: what is done ("lora", "decode"). facts: its shape, for people and plots. work: of one repeat.
    importance: 0 for what the goals are about; the least important are dropped when time runs short.
    tolerance: makes the case a check, which is not timed: the result of the first system is the reference, and the
    others' may be so far from it, relative to its norm (and single elements ten times as far, relative to its RMS).
    """

    op: str
    regime: str
    facts: Mapping[str, Any]
    work: Work
    systems: tuple[System, ...]
    importance: int = 0
    tolerance: float | None = None

    @property
    def label(self) -> str:
        """Unique among all cases."""
        facts = " ".join(f"{name}={value}" for name, value in self.facts.items())
        return f"{'check ' * self.is_check}{self.op} {self.regime} {facts}".rstrip()

    @property
    def is_check(self) -> bool:
        return self.tolerance is not None


@dataclass(frozen=True)
class Section:
    """The cases of one kind (`--only`). release: frees what they keep on the device between them."""

    name: str
    cases: Sequence[Case]
    release: Callable[[], None] = lambda: None


def chain(state: Callable[[], Any], arguments: Callable[[], Sequence[tuple[Any, ...]]]) -> Callable[[Any], Dispatch]:
    """The start of a program `(state, *arguments) -> state`, state donated: each dispatch takes up where the last one
    ended and reads the next of the sets of arguments, in turn."""

    def start(compiled: Any) -> Dispatch:
        now, sets, turn = state(), arguments(), 0

        def dispatch() -> Any:
            nonlocal now, turn
            now = compiled(now, *sets[turn % len(sets)])
            turn += 1
            return now

        return dispatch

    return start


def repeat(arguments: Callable[[], Sequence[tuple[Any, ...]]]) -> Callable[[Any], Dispatch]:
    """The start of a program `(*arguments) -> results`: each dispatch reads the next of the sets of arguments."""
    return lambda compiled: chain(lambda: None, arguments)(lambda _, *sets: compiled(*sets))
