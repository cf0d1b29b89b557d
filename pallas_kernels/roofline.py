"""The roofline model: the least work of a kernel, and its least time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Bytes read plus written in device memory, and floating-point operations.

    Sums (`+`, `sum(works, Work())`) describe consecutive kernels: an intermediate result counts twice.
    """

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.flops * times)

    def seconds(self, bandwidth: float, matmul_flops: float) -> float:
        """Returns the larger of the two floors. bandwidth: bytes per second. matmul_flops: operations per second."""
        return max(self.bytes / bandwidth, self.flops / matmul_flops)
