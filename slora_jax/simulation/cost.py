"""Time of a step, as a roofline of bytes and operations."""

from __future__ import annotations

from slora_jax.errors import ConfigError
from slora_jax.simulation.collective_cost import CollectiveCost
from slora_jax.simulation.device import DeviceModel
from slora_jax.simulation.lora_cost import LORA_COSTS
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.work import StepWork


class CostModel:
    """Seconds that one model's steps take on one device with one software.

    step = step_seconds + max(base + attention + adapters, launches) + adapters' overhead + collectives, with
      base      = max(bytes of all layers' weights (and of the head, if a row is sampled), 2 * elements * rows)
      attention = bytes of KV that decoding sequences read
                  + max(4 * q_width * layers * pairs of prompts, bytes of KV that prompts read)
      adapters  = see `LoraCost`
      launches  = layers * (layer_seconds + lora_layer_seconds, if a row has an adapter)
      collectives: see `CollectiveCost`; 0 on one device
    Products with quantised weights are those of the unquantised ones: codes are converted as they are read.
    Bytes and operations are divided by the device's ceiling times the software's efficiency. For a model on several
    devices (`shard_shape`), all terms are those of one device: the devices work in lockstep, and each copies its part
    of the adapters over its own link to the host.
    """

    def __init__(
        self, shape: ModelShape, device: DeviceModel, software: str, lora: str, lora_collectives: bool = True
    ) -> None:
        """Sets up the cost model.

        Args:
          software: a name of `SOFTWARE`.
          lora: a name of `LORA_COSTS`.
          lora_collectives: if False, adapters' traffic between devices takes no time.

        Raises:
          ConfigError: unknown software or lora.
        """
        if software not in device.efficiency:
            raise ConfigError(f"software={software!r}: must be one of {', '.join(device.efficiency)}")
        if lora not in LORA_COSTS:
            raise ConfigError(f"lora={lora!r}: must be one of {', '.join(LORA_COSTS)}")
        self.shape = shape
        self.device = device
        self.efficiency = efficiency = device.efficiency[software]
        self.lora = LORA_COSTS[lora](shape, device, efficiency)
        self.collectives: CollectiveCost | None = None
        if shape.shards.count > 1:
            stacks = self.lora.stacks if lora_collectives else ()
            self.collectives = CollectiveCost(shape, device, efficiency, stacks)
        bandwidth, flops = device.memory_bandwidth, device.matmul_flops
        layers, head = shape.num_layers * shape.layer_params, shape.head_params
        byte = 1 / (efficiency.bandwidth * bandwidth)
        products = 2 / (efficiency.matmul * flops)
        self._read_layers, self._read_head = shape.num_layers * shape.layer_bytes * byte, shape.head_bytes * byte
        self._row, self._sampled_row = layers * products, head * products
        self._context_token = shape.kv_bytes / (efficiency.attention * bandwidth)
        self._pair = 4 * shape.q_width * shape.num_layers / (efficiency.prefill_attention * flops)

    def base_seconds(self, work: StepWork) -> float:
        """Seconds of the products with the base weights."""
        read = self._read_layers + (self._read_head if work.sampled else 0.0)
        return max(read, self._row * work.rows + self._sampled_row * work.sampled)

    def attention_seconds(self, work: StepWork) -> float:
        """Seconds of attention, for decoding sequences and prompts."""
        seconds = self._context_token * work.decode_context
        if work.prompts:
            seconds += max(self._pair * work.prefill_pairs, self._context_token * work.prefill_context)
        return seconds

    def launch_seconds(self, work: StepWork) -> float:
        """The minimum time of a step: its kernel launches."""
        efficiency = self.efficiency
        with_lora = self.lora.launches and work.lora_rows
        layer = efficiency.layer_seconds + (efficiency.lora_layer_seconds if with_lora else 0.0)
        return self.shape.num_layers * layer

    def busy_seconds(self, work: StepWork) -> float:
        """The part of a step that occupies the device, so that no other replica can use it."""
        return self._computing(work) + self.collective_seconds(work)

    def collective_seconds(self, work: StepWork) -> float:
        """Seconds of the step's collectives; 0 on one device."""
        return 0.0 if self.collectives is None else self.collectives.seconds(work)

    def _computing(self, work: StepWork) -> float:
        computing = self.base_seconds(work) + self.attention_seconds(work)
        return computing + self.lora.compute(work) if work.lora_rows else computing

    def step_seconds(self, work: StepWork) -> float:
        """Seconds of a step on the device, from its first launch to its results."""
        overhead = self.efficiency.step_seconds
        if work.lora_rows:
            overhead += self.lora.overhead(work)
        return overhead + max(self._computing(work), self.launch_seconds(work)) + self.collective_seconds(work)

    def host_seconds(self, work: StepWork) -> float:
        """Seconds of host work for a step."""
        return self.efficiency.host_step_seconds + self.efficiency.host_sequence_seconds * work.sequences

    def copy_seconds(self, nbytes: float) -> float:
        """Seconds to copy an adapter, or some of its pages, from host memory on the copy lane."""
        efficiency = self.efficiency
        seconds = nbytes / (efficiency.host_to_device * self.device.host_to_device_bandwidth)
        return efficiency.adapter_load_seconds + seconds

    def move_seconds(self, nbytes: float) -> float:
        """Seconds to copy `nbytes` within device memory."""
        return 2 * nbytes / (self.efficiency.bandwidth * self.device.memory_bandwidth)

    def merge_seconds(self, rank: int) -> float:
        """Seconds to merge or unmerge an adapter: computes B A, then reads and writes every matrix that it changes."""
        shape, efficiency = self.shape, self.efficiency
        moved = self.move_seconds(shape.merged_params * shape.dtype_bytes)
        product = 2 * rank * shape.merged_params / (efficiency.matmul * self.device.matmul_flops)
        launches = 2 * shape.num_layers * len(shape.lora_targets) * efficiency.launch_seconds
        return max(moved + product, launches)
