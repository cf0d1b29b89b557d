"""Figure 8 as published: throughput of tensor parallelism, from the repository's `plot_tp.py` (branch `tp`).

Its commands were not published, so rate, duration and pool are unknown. The picture's label of the 30B model on four
devices misprints "2x".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure8Point:
    """A group of bars. setting: a name of `SETTINGS`. slora, without_lora_communication, base: requests per second of
    S-LoRA, of S-LoRA without communication for adapters, and of the base model alone."""

    setting: str
    device: str
    tp: int
    num_adapters: int
    slora: float
    without_lora_communication: float
    base: float


FIGURE_8 = (
    Figure8Point("S5", "a100-40", 2, 10, 0.60, 0.86, 1.21),
    Figure8Point("S5", "a100-40", 4, 10, 3.29, 4.09, 5.09),
    Figure8Point("S5", "a100-40", 2, 100, 0.60, 0.73, 1.31),
    Figure8Point("S5", "a100-40", 4, 100, 2.73, 3.42, 5.12),
    Figure8Point("S6", "a100-80", 2, 10, 0.22, 0.29, 0.60),
    Figure8Point("S6", "a100-80", 4, 10, 1.81, 2.41, 3.46),
)
