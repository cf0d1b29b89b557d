"""Least bytes of writes into one layer's pool: every byte is read once and written once. Addresses do not count."""

from __future__ import annotations

from pallas_kernels.roofline import Work


def write_kv_work(tokens: int, width: int, itemsize: int) -> Work:
    """A key and a value row `[width]` of each token."""
    return Work(bytes=2 * 2 * tokens * width * itemsize)


def write_pages_work(pages: int, page_size: int, width: int, itemsize: int) -> Work:
    """Whole pages, `[2, page_size, width]` each."""
    return Work(bytes=2 * pages * 2 * page_size * width * itemsize)
