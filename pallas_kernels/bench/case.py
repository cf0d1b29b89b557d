"""Cases, the systems compared in them, and the programs that these run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.roofline import Work

Dispatch = Callable[[], Any]
"""Runs a program once, asynchronously, and returns the arrays to wait for."""


@dataclass(frozen=True, eq=False)
class Program:
    """A jitted function and the shapes of its arguments. Several systems may share one.

    Attributes:
      name: unique among all programs.
      function: the jitted function.
      shapes: returns `jax.ShapeDtypeStruct` trees; like tracing, it raises NotImplementedError where a backend does not
        serve the shape.
    """

    name: str
    function: Any
    shapes: Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class System:
    """One way to do a case's work.

    Attributes:
      program: None: nothing is compiled.
      start: puts the arguments on the device and returns the dispatch function; called with the compiled program.
      repeats: how often one dispatch does the work.
      skip: reason not to measure it.
      work: this system's own, where the systems of a case differ.
      over: another system of the case. Its measured time is added to this system's floor, and `work` is what this
        system does beyond it.
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
    """Work of one shape, and the systems that are compared on it.

    Attributes:
      op, regime: for example "lora", "decode".
      facts: the shape, for labels and plots.
      work: of one repeat.
      importance: 0 for the goals' cases; cases with the highest number are dropped first when time runs short.
      tolerance: set for a check, which is not timed. The first system's result is the reference; the others' may differ
        by this much relative to its norm, and single elements by ten times as much relative to its RMS.
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


def chain(state: Callable[[], Any], arguments: Callable[[], Sequence[tuple[Any, ...]]]) -> Callable[[Any], Dispatch]:
    """Returns the `start` of a program `(state, *arguments) -> state` with donated state: each dispatch continues from
    the previous state and reads the next set of arguments, in turn."""

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
    """Returns the `start` of a program `(*arguments) -> results`: each dispatch reads the next set of arguments."""
    return lambda compiled: chain(lambda: None, arguments)(lambda _, *sets: compiled(*sets))


def declined(error: Exception) -> str:
    """The reason, if a backend does not serve the shape; else ""."""
    return str(error) if isinstance(error, NotImplementedError) else ""


def error_text(error: Exception) -> str:
    """Type and message, cut to 2000 characters."""
    return f"{type(error).__name__}: {error}"[:2000]
