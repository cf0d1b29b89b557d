"""In-place writes into the unified pool."""

from pallas_kernels.pool_write.api import NO_PAGE, write_kv, write_pages

__all__ = ["NO_PAGE", "write_kv", "write_pages"]
