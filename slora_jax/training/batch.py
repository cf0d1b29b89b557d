"""Examples, and their packing into rows and micro-steps.

A row holds sequences of one adapter only, and is filled by that adapter's examples alone. So its content does not
depend on what else is trained, and neither does any sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pallas_kernels.lora import LoraTiles
from pallas_kernels.lora.layout import ceil_div
from slora_jax.errors import RequestError
from slora_jax.training.config import TrainerConfig


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence to train on.

    Attributes:
      tokens: int32 `[n]`, the input at each position.
      targets: int32 `[n]`, the token to predict at each position.
      weights: float32 `[n]`; 0 at a position that is not trained.
      inputs: further float32 `[n]` arrays that the loss needs, by name.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)

    def check(self, vocab_size: int, longest: int, needed: Sequence[str]) -> None:
        """Raises RequestError naming the field, if the example cannot be trained on."""
        length = len(self.tokens)
        if not 1 <= length <= longest:
            raise RequestError(f"tokens: must have 1 to {longest} ids (TrainerConfig.lengths), found {length}")
        for name in ("tokens", "targets"):
            ids = np.asarray(getattr(self, name))
            if ids.shape != (length,) or ids.dtype.kind not in "iu":
                raise RequestError(f"{name}: must be {length} integers, found {ids.dtype} {[*ids.shape]}")
            wrong = ids[(ids < 0) | (ids >= vocab_size)]
            if wrong.size:
                raise RequestError(f"{name}: id {int(wrong[0])} is not in 0..{vocab_size - 1}, the vocabulary")
        missing = [name for name in needed if name not in self.inputs]
        if missing:
            raise RequestError(f"inputs: the loss needs {', '.join(map(repr, missing))}")
        for name, values in {"weights": self.weights, **self.inputs}.items():
            values = np.asarray(values)
            if values.shape != (length,) or values.dtype.kind not in "fiu":
                raise RequestError(f"{name}: must be {length} numbers, found {values.dtype} {[*values.shape]}")
            if not np.isfinite(values).all():
                raise RequestError(f"{name}: must be finite, found {values[~np.isfinite(values)][0]}")


@dataclass(frozen=True, eq=False)
class Row:
    """Sequences of one adapter, side by side.

    Attributes:
      slot: the adapter's slot.
      examples: each example with its number in the adapter's batch.
    """

    slot: int
    length: int
    examples: list[tuple[int, Example]]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one micro-step: `rows`, the first of the program's `num_rows`.

    Attributes:
      tokens, targets, positions, segments: int32 `[num_rows * length]`. Segments count the sequences of a row from 1;
        0 marks padding.
      inputs: float32 `[num_rows * length]` by name, with "weights"; 0 at padding.
    """

    rows: list[Row]
    num_rows: int
    length: int
    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    inputs: dict[str, np.ndarray]

    def spans(self) -> Iterator[tuple[int, int, slice]]:
        """The slot, the number in its adapter's batch, and the place of each example."""
        for index, row in enumerate(self.rows):
            at = index * self.length
            for number, example in row.examples:
                yield row.slot, number, slice(at, at + len(example.tokens))
                at += len(example.tokens)

    def tiles(self, tile_rows: int) -> LoraTiles:
        """The row tiles of the LoRA products: those of each row, as far as its sequences reach."""
        slots, first = [], []
        for index, row in enumerate(self.rows):
            used = sum(len(example.tokens) for _, example in row.examples)
            for tile in range(ceil_div(used, tile_rows)):
                slots.append(row.slot)
                first.append(index * self.length + tile * tile_rows)
        most = self.num_rows * ceil_div(self.length, tile_rows)
        padding = np.zeros(most - len(slots), np.int32)
        count, none = np.int32(len(slots)), np.int32(0)
        arrays: dict[str, Any] = {
            "slot": np.concatenate([slots, padding]).astype(np.int32),
            "first_row": np.concatenate([first, padding]).astype(np.int32),
            "rows": np.full(most, tile_rows, np.int32),
            "row_slot": np.zeros(0, np.int32),
            "num_tiles": count,
            "num_dense": count,
            "dense_rows": none,
            "lora_rows": none,
        }
        return LoraTiles(**arrays)


def pack(slot: int, examples: Sequence[Example], config: TrainerConfig) -> list[Row]:
    """Packs an adapter's examples into rows, each example into the first row with room for it (first fit)."""
    longest = max(len(example.tokens) for example in examples)
    length = next(length for length in config.lengths if length >= longest)
    rows: list[Row] = []
    room: list[int] = []
    for number, example in enumerate(examples):
        needed = len(example.tokens)
        index = next((i for i, free in enumerate(room) if free >= needed), len(rows))
        if index == len(rows):
            rows.append(Row(slot, length, []))
            room.append(length)
        rows[index].examples.append((number, example))
        room[index] -= needed
    return rows


def micro_batches(rows: Sequence[Row], inputs: Sequence[str], config: TrainerConfig) -> Iterator[MicroBatch]:
    """Divides rows into micro-steps, in order for each length: the largest programs first, then one for the rest.
    `inputs` are those of the examples that the loss needs."""
    for length in config.lengths:
        waiting = [row for row in rows if row.length == length]
        sizes = config.num_rows(length)
        while waiting:
            size = next((size for size in sizes if size >= len(waiting)), sizes[-1])
            yield _micro_batch(waiting[:size], size, length, inputs)
            waiting = waiting[size:]


def _micro_batch(rows: list[Row], num_rows: int, length: int, names: Sequence[str]) -> MicroBatch:
    ids = {name: np.zeros(num_rows * length, np.int32) for name in ("tokens", "targets", "positions", "segments")}
    inputs = {name: np.zeros(num_rows * length, np.float32) for name in ("weights", *names)}
    for index, row in enumerate(rows):
        at = index * length
        for segment, (_, example) in enumerate(row.examples, 1):
            own = slice(at, at + len(example.tokens))
            ids["tokens"][own], ids["targets"][own] = example.tokens, example.targets
            ids["positions"][own], ids["segments"][own] = np.arange(len(example.tokens)), segment
            inputs["weights"][own] = example.weights
            for name in names:
                inputs[name][own] = example.inputs[name]
            at = own.stop
    return MicroBatch(rows, num_rows, length, **ids, inputs=inputs)
