"""The waiting queue, in order of arrival, by tenant and by adapter, with constant-time operations."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Any, overload

from slora_jax.scheduling.request import Request

by_number = attrgetter("number")


class ArrivalOrder(Sequence[Request]):
    """Requests in order of `number`.

    Adding the newest, removing any, and reading the first or last take constant time. Preempted requests that return
    are in a small sorted list, merged in during iteration. Must not be changed during iteration.
    """

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self._arrived: OrderedDict[int, Request] = OrderedDict()
        self._returned: list[Request] = []
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        if self._arrived and request.number < next(reversed(self._arrived)):
            insort(self._returned, request, key=by_number)
        else:
            self._arrived[request.number] = request

    def remove(self, request: Request) -> None:
        """Raises `KeyError` if the request is not in the queue."""
        if self._arrived.pop(request.number, None) is None:
            remove_sorted(self._returned, request)

    def __len__(self) -> int:
        return len(self._arrived) + len(self._returned)

    def __iter__(self) -> Iterator[Request]:
        if not self._returned:
            return iter(self._arrived.values())
        return merge(self._returned, self._arrived.values(), key=by_number)

    def __reversed__(self) -> Iterator[Request]:
        if not self._returned:
            return reversed(self._arrived.values())
        return merge(reversed(self._returned), reversed(self._arrived.values()), key=by_number, reverse=True)

    def __contains__(self, request: object) -> bool:
        if not isinstance(request, Request):
            return False
        return self._arrived.get(request.number) is request or any(r is request for r in self._returned)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: Any) -> Any:
        """Constant time at both ends; linear elsewhere and for slices."""
        if isinstance(index, slice):
            return list(self)[index]
        try:
            return next(islice(self, index, None) if index >= 0 else islice(reversed(self), -1 - index, None))
        except StopIteration:
            raise IndexError(f"request {index} of {len(self)}") from None


class RequestQueue(ArrivalOrder):
    """The waiting queue.

    Attributes:
      by_tenant: the same requests by tenant, each group in order of arrival and non-empty.
      by_adapter: likewise by adapter digest, None for the base model.
    """

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self._by_tenant: dict[str, ArrivalOrder] = {}
        self._by_adapter: dict[str | None, ArrivalOrder] = {}
        super().__init__(requests)

    @property
    def by_tenant(self) -> Mapping[str, ArrivalOrder]:
        return self._by_tenant

    @property
    def by_adapter(self) -> Mapping[str | None, ArrivalOrder]:
        return self._by_adapter

    def add(self, request: Request) -> None:
        super().add(request)
        self._by_tenant.setdefault(request.tenant, ArrivalOrder()).add(request)
        self._by_adapter.setdefault(request.digest, ArrivalOrder()).add(request)

    def remove(self, request: Request) -> None:
        super().remove(request)
        _remove_from_group(self._by_tenant, request.tenant, request)
        _remove_from_group(self._by_adapter, request.digest, request)


def remove_sorted(requests: list[Request], request: Request) -> None:
    """Removes a request from a list sorted by `number`. Raises `KeyError` if it is absent."""
    at = bisect_left(requests, request.number, key=by_number)
    if at == len(requests) or requests[at] is not request:
        raise KeyError(request.id)
    del requests[at]


def _remove_from_group(groups: dict[Any, ArrivalOrder], key: str | None, request: Request) -> None:
    group = groups[key]
    group.remove(request)
    if not group:
        del groups[key]
