"""A router for Ray Serve that takes turns, for comparison."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class RoundRobinRouter(RequestRouter):
    """Sends each request to the next replica in turn, and to the one after that if the next is full."""

    _turn = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns one replica; they take turns in the order of their ids."""
        in_order = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        self._turn += 1
        return [[in_order[self._turn % len(in_order)]]]
