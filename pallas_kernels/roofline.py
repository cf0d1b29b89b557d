"""The least that a kernel must do, and the least time that takes (the roofline model)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Bytes that must move through device memory, reads plus writes, and floating-point operations.

    Sums (`+`, `sum(works, Work())`) are of kernels that follow one another: what one leaves for the next counts twice.
    """

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.flops * times)

    def seconds(self, bandwidth: float, matmul_flops: float) -> float:
        """The larger of the two floors. bandwidth: bytes per second. matmul_flops: operations per second."""
        return max(self.bytes / bandwidth, self.flops / matmul_flops)
