"""Time that the shards of a model spend in collectives in a step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from slora_jax.parallel.cost import Message, base_messages, lora_messages, vocabulary_messages
from slora_jax.simulation.device import DeviceModel, Efficiency
from slora_jax.simulation.shape import ModelShape
from slora_jax.simulation.work import StepWork


class CollectiveCost:
    """Each collective takes `collective_seconds`, plus a device's bytes sent in a ring over `link * link_bandwidth`.

    Nothing overlaps with collectives. Their messages are those of `parallel.cost`: for the base in every layer; for
    adapters in every layer, at the batch's largest rank, if a row has one; for embeddings and tokens once per step.
    """

    def __init__(
        self,
        shape: ModelShape,
        device: DeviceModel,
        efficiency: Efficiency,
        lora_stacks: tuple[tuple[str, ...], ...],
    ) -> None:
        """Sets up the cost of one shard.

        Args:
          shape: the shard's shape.
          lora_stacks: projections whose adapters share a collective; empty if adapters' traffic is free.
        """
        self._layers, self._shards, self._itemsize = shape.num_layers, shape.shards, shape.dtype_bytes
        self._hidden = shape.whole.hidden_size
        self._stacks = lora_stacks
        self._bandwidth = efficiency.link * device.link_bandwidth
        self._latency = efficiency.collective_seconds
        self._base = self._seconds(base_messages(self._hidden, 1, self._itemsize))
        self._embedding, self._token = (
            self._seconds([message])
            for message in vocabulary_messages(self._hidden, self._shards, 1, 1, self._itemsize)
        )
        self._lora = cache(self._lora_of_rank)

    def seconds(self, work: StepWork) -> float:
        """Seconds of all collectives of a step."""
        rows = work.rows
        calls, sent = self._base
        layer = calls + sent * rows
        if work.lora_rows:
            calls, sent = self._lora(work.max_rank)
            layer += calls + sent * rows
        once = self._embedding[0] + self._embedding[1] * rows
        if work.sampled:
            once += self._token[0] + self._token[1] * work.sampled
        return self._layers * layer + once

    def _lora_of_rank(self, rank: int) -> tuple[float, float]:
        return self._seconds(lora_messages(self._shards, 1, rank, self._itemsize, self._stacks))

    def _seconds(self, row_messages: Iterable[Message]) -> tuple[float, float]:
        """Returns (seconds of the calls, seconds per row) from the messages of one row."""
        messages = list(row_messages)
        sent = float(sum(message.sent(self._shards.count) for message in messages))
        return len(messages) * self._latency, sent / self._bandwidth
