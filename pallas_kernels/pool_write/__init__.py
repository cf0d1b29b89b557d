"""In-place writes into the unified pool."""

from pallas_kernels.pool_write.api import write_kv, write_pages

__all__ = ["write_kv", "write_pages"]
