"""What adapters add to a step, by how a system computes them."""

from __future__ import annotations

from dataclasses import dataclass

from slora_jax.models.projections import STACKS
from slora_jax.simulation.device import DeviceModel, Efficiency
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.work import StepWork


@dataclass(frozen=True)
class LoraCost:
    """No adapters at all, and the seam of every way to compute them. All results are seconds of one step.

    Bytes over `b = lora * memory_bandwidth`, operations over `f = matmul * matmul_flops` (matrix units) or
    `v = lora_flops * vector_flops`; `w` are the bytes and `p` the elements of an adapter per rank (`ModelShape`).
    """

    shape: ModelShape
    device: DeviceModel
    efficiency: Efficiency

    launches = False
    """Returns whether every layer has kernels of its own for adapters."""
    pads = False
    """Returns whether the cost depends on runs of equal adapters in the batch (`StepWork.segments`,
    `longest_segment`)."""

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """Projections whose adapters share a collective, on several devices."""
        return ()

    def compute(self, work: StepWork) -> float:
        """Time on the device, in a row with the base model's."""
        return 0.0

    def overhead(self, work: StepWork) -> float:
        """Time that nothing else overlaps with."""
        return 0.0

    def _read(self, ranks: float) -> float:
        """Seconds to read so many ranks of adapters."""
        return ranks * self.shape.lora_bytes / (self.efficiency.lora * self.device.memory_bandwidth)


class Segmented(LoraCost):
    """This engine: rows sorted by adapter, each adapter read once, on the matrix units.

    max(adapter_ranks * w / b, 2 * row_ranks * p / f)
    """

    launches = True

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """All of them: a program does not depend on what adapters have."""
        return tuple(STACKS.values())

    def compute(self, work: StepWork) -> float:
        operations = 2 * work.row_ranks * self.shape.lora_params
        return max(self._read(work.adapter_ranks), operations / (self.efficiency.matmul * self.device.matmul_flops))


class Mbgmv(LoraCost):
    """S-LoRA's kernels, as its code chooses them.

    MBGMV, on the vector units, each sequence reading its adapter, from memory once and from the cache after that:
      max(r * w / b, 2 * row_ranks * p / v),  r = adapter_ranks + lora_reread * (sequence_ranks - adapter_ranks)
    MBGMM, on one device, in steps of 2 or more prompts, the longest of at least 200 rows and the largest rank at least
    64: tiles over all rows and the largest rank, in Triton like the attention over prompts, whose share of the matrix
    units `a` it gets:
      max(r * w / b, 2 * lora_rows * max_rank * p / a)
    """

    launches = True

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """Each projection by itself."""
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
    """`--bmm`: each step copies the adapters, once per run of equal ones (`segments`), zero-padded to the largest rank,
    and multiplies with `torch.bmm`, the inputs padded to the longest run; then gives the memory back.

    compute:  (sequence of copies and product: read, write, read) 3 * segments * max_rank * w / b
              + 2 * segments * longest_segment * max_rank * p / f
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
"""By the name in `SystemConfig.lora`. A system that merges adapters pays nothing in a step ("none")."""
