"""Reserve-all-output admission, as in the paper's code: the pool must hold all output that is still to come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slora_jax.memory import PrefixNode
from slora_jax.scheduling.request import Request

READ_LATE = 1
"""Steps for which a sequence keeps its pages after its last one."""


class Reservation:
    """Bounds the peak KV of the running requests, assuming that each generates `max_new` tokens.

    Every running sequence gains one token per step. Let the sequences be sorted by remaining tokens `l`, descending,
    and hold `u` tokens each. When the i-th (from 1) finishes, exactly the first i are still running, so the peak is

        max_i (i * l_i + sum_{j <= i} u_j)  tokens                 (S-LoRA `ReqQueue._can_add_new_req`)

    which is less than the sum of all final lengths, because short requests free their pages before long ones end.
    `u` includes page_size - 1 extra tokens for partly filled pages, and `l` one extra step, because a sequence's pages
    are freed one step late. The bound assumes one token per sequence and step. Prefill chunks can delay sequences, so
    preemption remains as a fallback. A request that runs alone is always admitted; it was checked on arrival.

    Pages of prefixes shared by several running requests are subtracted from the pool instead of counted in `u`. Sharing
    is detected per tree (`PrefixNode.top`), for speed. These pages may become free earlier, so the bound is safe.

    Args:
      running: the running requests.
      pages: number of free and evictable pages.
      page_size: tokens per page.
    """

    def __init__(self, running: Sequence[Request], pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._requests = list(running)
        self._shared = [0 if r.prefix is None or r.prefix.top.users < 2 else r.prefix.depth for r in running]
        self._tokens = (pages + sum([len(r.pages) for r in running]) - sum(self._shared)) * page_size
        prompt = np.array([len(r.prompt) for r in running], np.int64)
        sampled = np.array([r.num_sampled for r in running], np.int64)
        used = prompt + np.maximum(sampled - 1, 0)
        final = prompt + np.array([r.max_new for r in running], np.int64) - 1
        remaining = np.maximum(final - used, 0)
        used -= np.array(self._shared, np.int64) * page_size
        self._order = np.argsort(-remaining, kind="stable")  # indices into `_requests`
        self._remaining = remaining[self._order] + READ_LATE
        self._used = used[self._order] + page_size - 1

    def take(
        self, request: Request, adapter_pages: int = 0, prefix: PrefixNode | None = None, idle_pages: int = 0
    ) -> bool:
        """Adds a request if it fits beside the others. Returns whether it was added.

        Args:
          adapter_pages: pages that its adapter takes from the pool.
          prefix: deepest cached prefix that it will use.
          idle_pages: number of idle pages of that prefix.
        """
        used, shared = request.num_tokens, 0
        remaining = max(len(request.prompt) + request.max_new - 1 - used, 0) + READ_LATE
        if prefix is not None and prefix.top.users:
            self._share(prefix.top)
            shared = prefix.depth  # its idle pages are subtracted from the pool
        else:
            idle_pages = 0  # counted in `used`
        available = self._tokens - (adapter_pages + idle_pages) * self._page_size
        at = int(np.searchsorted(-self._remaining, -remaining, side="right"))
        all_remaining = np.insert(self._remaining, at, remaining)
        all_used = np.insert(self._used, at, used - shared * self._page_size + self._page_size - 1)
        if self._remaining.size and peak(all_used, all_remaining) > available:
            return False
        self._order = np.insert(self._order, at, len(self._requests))
        self._requests.append(request)
        self._shared.append(shared)
        self._used, self._remaining, self._tokens = all_used, all_remaining, available
        return True

    def _share(self, top: PrefixNode) -> None:
        """Counts the pages of this tree that the requests hold as shared, including pages added in this step."""
        for index, request in enumerate(self._requests):
            if request.prefix is not None and request.prefix.top is top:
                more = request.prefix.depth - self._shared[index]
                if not more:
                    continue
                self._shared[index] += more
                self._used[self._order == index] -= more * self._page_size
                self._tokens -= more * self._page_size


def peak(used: np.ndarray, remaining: np.ndarray) -> int:
    """Returns the peak number of tokens of sequences that hold `used` tokens and gain `remaining`, both int64 `[n]`, in
    descending order of `remaining`."""
    return int((np.arange(1, used.size + 1) * remaining + np.cumsum(used)).max())
