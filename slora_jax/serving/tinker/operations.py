"""Training operations, and the queue that runs them on the engine's thread between its steps."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from slora_jax.engine import Engine
from slora_jax.errors import RequestError
from slora_jax.serving.engine_loop import EngineLoop
from slora_jax.training import Adam, Example, Outcome, StepReport, Trainer


class Operation(ABC):
    """An operation on one model. It runs in parts, each in one turn of the engine's loop.

    Attributes:
      key: operations of different models with the same key run in one call of the trainer.
      result: set by the last `add`.
    """

    key: Hashable
    result: Any = None

    @property
    def tokens(self) -> int:
        """Number of tokens in the next part."""
        return 0

    @abstractmethod
    def run(self, engine: Engine, trainer: Trainer, names: Mapping[str, Any]) -> Mapping[str, Any]:
        """Runs the next part of several operations with this key, on the engine's thread, and returns a result for
        each model.

        Args:
          names: the operations by model.
        """

    @abstractmethod
    def add(self, result: Any) -> bool:
        """Adds the result of a part. Returns whether it was the last one. Raises RequestError if the part failed."""


class Pass(Operation):
    """A forward pass of one model's examples, or a forward and a backward pass. `result`: the loss, and for each
    example the log-probabilities of its targets.

    The parts depend on nothing but the examples, so gradients do not depend on what other clients do.
    """

    def __init__(self, examples: Sequence[Example], loss: Any, is_backward: bool, part_tokens: int) -> None:
        """Creates the operation.

        Args:
          loss: name of a loss, or a function as `Trainer.forward_backward` takes.
          part_tokens: tokens of a part; an example is never cut.
        """
        self.key = ("pass", is_backward, loss)
        self._examples, self._loss, self._is_backward = examples, loss, is_backward
        self._parts = deque(_cut(examples, part_tokens))
        self._has_run = False
        self._sum = 0.0
        self._logprobs: dict[int, np.ndarray] = {}

    @property
    def tokens(self) -> int:
        return sum(len(self._examples[index].tokens) for index in self._parts[0])

    @property
    def part(self) -> list[Example]:
        """Examples of the next part."""
        return [self._examples[index] for index in self._parts[0]]

    def run(self, engine: Engine, trainer: Trainer, names: Mapping[str, Pass]) -> Mapping[str, Outcome]:
        run = trainer.forward_backward if self._is_backward else trainer.forward
        return run({name: one.part for name, one in names.items()}, self._loss)

    def add(self, result: Outcome) -> bool:
        if result.error is not None:
            partly = " (its gradient has the examples before)" if self._has_run and self._is_backward else ""
            raise RequestError(f"{result.error}{partly}")
        self._has_run = True
        self._sum += result.loss
        self._logprobs |= zip(self._parts.popleft(), result.logprobs, strict=True)
        if self._parts:
            return False
        self.result = self._sum, [self._logprobs[index] for index in range(len(self._examples))]
        return True


class Step(Operation):
    """An optimizer step of one model. `result`: its `StepReport`."""

    key = "step"

    def __init__(self, adam: Adam) -> None:
        self._adam = adam

    def run(self, engine: Engine, trainer: Trainer, names: Mapping[str, Step]) -> Mapping[str, StepReport]:
        return trainer.optim_step({name: one._adam for name, one in names.items()})

    def add(self, result: StepReport) -> bool:
        if result.error is not None:
            raise RequestError(result.error)
        self.result = result
        return True


class Call(Operation):
    """Any other operation of one model. `result`: what `function` returns."""

    def __init__(self, function: Callable[[Engine, Trainer], Any]) -> None:
        self.key = object()  # runs alone
        self._function = function

    def run(self, engine: Engine, trainer: Trainer, names: Mapping[str, Call]) -> Mapping[str, Any]:
        [name] = names
        return {name: self._function(engine, trainer)}

    def add(self, result: Any) -> bool:
        self.result = result
        return True


class OperationQueue:
    """Runs each model's operations in order, and those of different models together where that is possible. Lives in
    the event loop."""

    def __init__(self, loop: EngineLoop, trainer: Callable[[], Trainer], turn_tokens: int) -> None:
        """Creates an empty queue; `run` runs it.

        Args:
          trainer: returns the trainer, which exists once the engine does.
          turn_tokens: tokens beyond which a turn includes no further model.
        """
        self._loop, self._trainer, self._turn_tokens = loop, trainer, turn_tokens
        self._queues: dict[str, deque[tuple[Operation, asyncio.Future]]] = {}  # in the order of their next turn
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        """Returns the number of unfinished operations."""
        return sum(map(len, self._queues.values()))

    def is_busy(self, model: str) -> bool:
        """Returns whether a model has unfinished operations."""
        return model in self._queues

    def submit(self, model: str, operation: Operation) -> asyncio.Future:
        """Queues an operation; the future gets its result or its error."""
        future = asyncio.get_running_loop().create_future()
        self._queues.setdefault(model, deque()).append((operation, future))
        self._filled.set()
        return future

    async def run(self) -> None:
        """Runs operations until it is cancelled."""
        while True:
            await self._filled.wait()
            turn = self._next_turn()
            if not turn:
                self._filled.clear()
                continue
            first = next(iter(turn.values()))
            try:
                run = partial(first.run, trainer=self._trainer(), names=turn)
                results = await self._loop.call(run, is_long=True)
            except Exception as error:  # noqa: BLE001  reported to the clients
                for model in turn:
                    self._end(model, error)
                continue
            for model, operation in turn.items():
                self._add(model, operation, results[model])

    def _next_turn(self) -> dict[str, Operation]:
        """Returns the operations that run next, by model: the first one, and those that can run together with it."""
        turn: dict[str, Operation] = {}
        for model, queue in self._queues.items():
            operation = queue[0][0]
            if all(operation.key == one.key for one in turn.values()):
                turn[model] = operation
            if sum(one.tokens for one in turn.values()) >= self._turn_tokens:
                break
        for model in turn:
            self._queues[model] = self._queues.pop(model)
        return turn

    def _add(self, model: str, operation: Operation, result: Any) -> None:
        try:
            if operation.add(result):
                self._end(model)
        except Exception as error:  # noqa: BLE001  reported to the client
            self._end(model, error)

    def _end(self, model: str, error: Exception | None = None) -> None:
        """Ends a model's first operation."""
        operation, future = self._queues[model].popleft()
        if not self._queues[model]:
            del self._queues[model]
        if future.done():  # cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(operation.result)


def _cut(examples: Sequence[Example], tokens: int) -> list[list[int]]:
    """Cuts examples into parts, and returns the examples' indices. Examples of similar length share a part, which then
    needs fewer micro-steps."""
    parts: list[list[int]] = []
    size = 0
    for index in sorted(range(len(examples)), key=lambda index: len(examples[index].tokens)):
        length = len(examples[index].tokens)
        if not parts or size + length > tokens:
            parts.append([])
            size = 0
        parts[-1].append(index)
        size += length
    return parts
