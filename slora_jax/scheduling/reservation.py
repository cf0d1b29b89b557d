"""Reserve-all-output admission: the pool must suffice for every token that is still to come (the paper's, as coded)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slora_jax.memory import PrefixNode
from slora_jax.scheduling.request import Request

READ_LATE = 1
"""Steps after its last that a sequence keeps its pages."""


class Reservation:
    """The most KV that the running requests will ever hold together, if each generates all it may.

    Every running sequence gains one token a step. Sorted by tokens still to come, `l` descending, with `u` tokens each
    now, the i longest (i from 1) are all still there when the i-th ends, so the peak is

        max_i (i * l_i + sum_{j <= i} u_j)  tokens                 (S-LoRA `ReqQueue._can_add_new_req`)

    which is less than the sum of all final lengths, as short requests make room for long ones. A page's rounding is
    covered by counting page_size - 1 tokens more per sequence, and one step is added to every `l`, as the end of a
    sequence is read, and its pages are free, one step late. The peak is exact when every sequence gets its token in
    every step; chunks of long prompts can delay some, so preemption stays as the way out. A request that runs alone is
    always admitted: it was checked on arrival.

    Prefixes that several running requests share (trees with more than one user, for speed) are not theirs: `u_j` are
    the tokens beyond them, and their pages are taken from the pool for good. They may become free earlier, so this
    errs on the safe side.

    pages: those that are free, or can be freed by eviction.
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
        """Whether the request fits with the others, and with `adapter_pages` more for its adapter; if so, it is one of
        them from now on. prefix: what it will find in the cache; `idle_pages` of that nobody holds."""
        used, shared = request.num_tokens, 0
        remaining = max(len(request.prompt) + request.max_new - 1 - used, 0) + READ_LATE
        if prefix is not None and prefix.top.users:
            self._share(prefix.top)
            shared = prefix.depth  # of these, the idle pages leave the pool too
        else:
            idle_pages = 0  # of a tree of its own: among `used`
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
        """Counts what the requests hold of this tree, pages added in this step included, as shared."""
        for index, request in enumerate(self._requests):
            if request.prefix is not None and request.prefix.top is top:
                more = request.prefix.depth - self._shared[index]
                if not more:
                    continue
                self._shared[index] += more
                self._used[self._order == index] -= more * self._page_size
                self._tokens -= more * self._page_size


def peak(used: np.ndarray, remaining: np.ndarray) -> int:
    """Most tokens held at once, of sequences by `remaining` descending. Both int64 `[n]`, tokens."""
    return int((np.arange(1, used.size + 1) * remaining + np.cumsum(used)).max())
