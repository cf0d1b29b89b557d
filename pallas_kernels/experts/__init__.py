"""The feed-forward part of layers with experts: each token's rows go only through the experts chosen for it."""

from pallas_kernels.experts.api import IMPLEMENTATIONS, Implementation, expert_outputs

__all__ = ["IMPLEMENTATIONS", "Implementation", "expert_outputs"]
