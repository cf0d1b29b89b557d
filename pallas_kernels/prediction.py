"""Predicted times of the kernels, from their compiled code.

A call takes its launches, and the largest of five times: its bytes, or its operations, at the device's rates; its
warp-instructions at the rate at which the multiprocessors issue them; full rounds of its programs, each with its share
of the bandwidth; and, of a kernel that starts an item's loads only when the item before is done, the items of a program
one after another. What compiled code costs is data, `costs.json`.

Nothing was measured. The constants below and the counts in `costs.json` reproduce a review of the compiled kernels for
Llama-3-8B on an H200; measurements are to be held against the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from math import ceil
from typing import Any

from pallas_kernels.devices import Device
from pallas_kernels.roofline import Work

COPY_SHARE = 4.3 / 4.8
"""Bandwidth of a copy, as a share of the data sheet's."""
MATMUL_SHARE = 0.75
"""Rate of a large matrix product, as a share of the data sheet's."""
ROUND_TRIP_SECONDS = 0.5e-6
"""Latency of a load from device memory."""
ISSUE = 2.2
"""Warp-instructions per clock that a multiprocessor with many warps issues; it has four schedulers."""
WARP_ISSUE = 0.38
"""Warp-instructions per clock of one warp."""


@dataclass(frozen=True)
class KernelCost:
    """Costs of a kernel beside bytes and operations.

    Attributes:
      round_trips: loads in a program's prologue and epilogue of which each waits for the one before.
      instructions_per_kb: warp-instructions per KB of weights, or of keys and values; None: not counted.
      instructions_per_item: warp-instructions of an item beside them.
      item_round_trips: loads of an item of which each waits for the one before; 0: items overlap.
      warps: per program.
      per_sm: programs that reside on one multiprocessor.
      steady: a program draws no more bandwidth in the last round, when fewer are resident; otherwise up to a
        multiprocessor's share.
      matmul: share of the data sheet's matrix rate that the kernel reaches.
      launches: of one call.
      launch_seconds: of each: 1 µs as a node of a command buffer.
      passes: reads of the input.
    """

    round_trips: int = 0
    instructions_per_kb: float | None = None
    warps: int = 4
    per_sm: int = 16
    steady: bool = False
    matmul: float = MATMUL_SHARE
    launches: int = 1
    launch_seconds: float = 1e-6
    passes: int = 1
    instructions_per_item: float = 0.0
    item_round_trips: int = 0


@cache
def _costs() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files("pallas_kernels").joinpath("costs.json").read_text())


def kernel_cost(op: str, regime: str) -> KernelCost:
    """Returns the cost of a kernel from `costs.json`. op, regime: as in a benchmark's case."""
    return KernelCost(**_costs()[f"{op} {regime}"])


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
      works: parts that follow one another, for example prefill rows and decode rows.
      programs: blocks of the grid with work, or items that the programs of a persistent grid take; 0: enough.
      kilobytes: of weights, or of keys and values, that all programs process.
    """

    works: tuple[Work, ...]
    cost: KernelCost
    programs: int = 0
    kilobytes: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds, by what bounds them: "launch", "bandwidth", "matmul", "issue", "waves" or "latency".
    They add up."""

    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """The largest part."""
        return max(self.parts, key=lambda name: self.parts[name])

    def __add__(self, other: Prediction) -> Prediction:
        names = dict.fromkeys((*self.parts, *other.parts))
        return Prediction({name: self.parts.get(name, 0.0) + other.parts.get(name, 0.0) for name in names})

    def __mul__(self, times: int) -> Prediction:
        return Prediction({name: times * seconds for name, seconds in self.parts.items()})


def copy_bandwidth(device: Device) -> float:
    """Assumed bytes per second of a copy."""
    return COPY_SHARE * device.bandwidth


def floor_seconds(work: Work, device: Device) -> float:
    """Least time of `work` at the assumed rates of a copy and of a large product."""
    return work.seconds(copy_bandwidth(device), MATMUL_SHARE * device.matmul_flops)


def predict(call: Call, device: Device, clock: float) -> Prediction:
    """Predicts one call. clock: of the multiprocessors, in Hz.

    The bound is the first of bandwidth (or matmul), issue, waves and latency that takes at least nine tenths of the
    largest.
    """
    cost, sms = call.cost, device.num_sms
    bandwidth, matmul = copy_bandwidth(device), cost.matmul * device.matmul_flops
    moving = sum(cost.passes * work.bytes / bandwidth for work in call.works)
    busy = sum(max(cost.passes * work.bytes / bandwidth, work.flops / matmul) for work in call.works)
    times = {"matmul" if busy > 1.1 * moving else "bandwidth": busy}
    if programs := call.programs:
        busiest = ceil(programs / sms)  # programs of one multiprocessor
        warps = min(busiest, cost.per_sm) * cost.warps
        instructions = (cost.instructions_per_kb or 0.0) * call.kilobytes / programs + cost.instructions_per_item
        times["issue"] = instructions * busiest / (clock * min(ISSUE, WARP_ISSUE * warps))
        slots = cost.per_sm * sms
        rounds, rest = divmod(programs, slots)
        last = 0 if rest == 0 else slots if cost.steady and rounds else max(rest, sms)
        times["waves"] = (rounds * slots + last) * busy / programs
        if cost.item_round_trips:
            item = instructions / (cost.warps * WARP_ISSUE * clock) + busy * sms / programs
            times["latency"] = ceil(programs / slots) * (cost.item_round_trips * ROUND_TRIP_SECONDS + item)
    largest = max(times.values())
    bound = next(name for name, seconds in times.items() if seconds >= 0.9 * largest)
    launch = cost.launches * cost.launch_seconds + cost.round_trips * ROUND_TRIP_SECONDS
    return Prediction({"launch": launch, bound: largest})
