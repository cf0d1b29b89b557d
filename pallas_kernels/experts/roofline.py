"""Least work of the experts of one layer. Results between the two products count in neither."""

from __future__ import annotations

from pallas_kernels.roofline import Work


def expert_work(tokens: int, per_token: int, used: int, hidden: int, ffn: int, itemsize: int) -> Work:
    """The weights of the `used` experts, which some token has chosen, each token's input and output, and the three
    products of each of a token's experts. Addresses and routing weights do not count."""
    return Work(
        bytes=itemsize * (used * 3 * hidden * ffn + 2 * tokens * hidden),
        flops=2 * tokens * per_token * 3 * hidden * ffn,
    )
