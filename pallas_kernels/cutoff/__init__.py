"""The threshold of top-k and top-p sampling."""

from pallas_kernels.cutoff.api import cutoff

__all__ = ["cutoff"]
