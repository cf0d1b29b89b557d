"""Cost that adapters add to a step, for each way of computing them."""

from __future__ import annotations

from dataclasses import dataclass

from slora_jax.models.projections import STACKS
from slora_jax.simulation.device import DeviceModel, Efficiency
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.work import StepWork


@dataclass(frozen=True)
class LoraCost:
    """Base class, and the cost without adapters (0). All results are seconds of one step.

    In the subclasses' formulas, bytes are divided by `b = lora * memory_bandwidth` and operations by
    `f = matmul * matmul_flops` (matrix units) or `v = lora_flops * vector_flops`; `w` is an adapter's bytes and `p` its
    elements per rank (`ModelShape.lora_bytes`, `lora_params`).
    """

    shape: ModelShape
    device: DeviceModel
    efficiency: Efficiency

    launches = False
    """Whether every layer launches additional kernels for adapters."""
    pads = False
    """Whether the cost depends on `StepWork.segments` and `longest_segment`."""

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """Projections whose adapters share a collective, on several devices."""
        return ()

    def compute(self, work: StepWork) -> float:
        """Seconds on the device, added to those of the base model."""
        return 0.0

    def overhead(self, work: StepWork) -> float:
        """Seconds that overlap with nothing."""
        return 0.0

    def _read(self, ranks: float) -> float:
        """Seconds to read adapters with this sum of ranks."""
        return ranks * self.shape.lora_bytes / (self.efficiency.lora * self.device.memory_bandwidth)


class Segmented(LoraCost):
    """This engine: rows sorted by adapter, each adapter read once, on the matrix units.

    max(adapter_ranks * w / b, 2 * row_ranks * p / f)
    """

    launches = True

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """All stacks: a compiled program does not depend on the adapters' targets."""
        return tuple(STACKS.values())

    def compute(self, work: StepWork) -> float:
        operations = 2 * work.row_ranks * self.shape.lora_params
        return max(self._read(work.adapter_ranks), operations / (self.efficiency.matmul * self.device.matmul_flops))


class Mbgmv(LoraCost):
    """S-LoRA's kernels, selected as in its code.

    MBGMV runs on the vector units; each sequence reads its adapter, the first time from memory, then from cache:
      max(r * w / b, 2 * row_ranks * p / v),  r = adapter_ranks + lora_reread * (sequence_ranks - adapter_ranks)
    MBGMM runs on one device in steps with at least 2 prompts, a longest prompt of at least 200 rows, and a largest rank
    of at least 64. Its tiles cover all rows at the largest rank. It is a Triton kernel like prompt attention, and gets
    the same share of the matrix units, `a = prefill_attention * matmul_flops`:
      max(r * w / b, 2 * lora_rows * max_rank * p / a)
    """

    launches = True

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """One collective for each projection."""
        return tuple((projection,) for projection in self.shape.lora_targets)

    def compute(self, work: StepWork) -> float:
        device, efficiency = self.device, self.efficiency
        again = work.sequence_ranks - work.adapter_ranks
        read = self._read(work.adapter_ranks + efficiency.lora_reread * again)
        is_alone = self.shape.shards.count == 1
        if is_alone and work.prompts >= 2 and work.longest_prompt >= 200 and work.max_rank >= 64:
            operations = 2 * work.lora_rows * work.max_rank * self.shape.lora_params
            return max(read, operations / (efficiency.prefill_attention * device.matmul_flops))
        operations = 2 * work.row_ranks * self.shape.lora_params
        return max(read, operations / (efficiency.lora_flops * device.vector_flops))


class Bmm(LoraCost):
    """S-LoRA's `--bmm`: each step copies one adapter per segment, zero-padded to the largest rank, multiplies with
    `torch.bmm`, with inputs padded to the longest segment, and frees the copies.

    compute:  3 * segments * max_rank * w / b  (read, write, read) + 2 * segments * longest_segment * max_rank * p / f
    overhead: segments * layers * projections * 2 copies * launch_seconds + allocation_seconds
    """

    launches = True
    pads = True

    def compute(self, work: StepWork) -> float:
        padded = work.segments * work.max_rank
        operations = 2 * padded * work.longest_segment * self.shape.lora_params
        return 3 * self._read(padded) + operations / (self.efficiency.matmul * self.device.matmul_flops)

    def overhead(self, work: StepWork) -> float:
        if not work.segments:
            return 0.0
        copies = work.segments * self.shape.num_layers * len(self.shape.lora_targets) * 2
        return copies * self.efficiency.launch_seconds + self.efficiency.allocation_seconds


LORA_COSTS: dict[str, type[LoraCost]] = {"none": LoraCost, "segmented": Segmented, "mbgmv": Mbgmv, "bmm": Bmm}
"""Costs by the name in `SystemConfig.lora`. A system that merges adapters uses "none"."""
