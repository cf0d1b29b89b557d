"""A router for Ray Serve that takes turns, for comparison with those that do not."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class RoundRobinRouter(RequestRouter):
    """Sends each request to the replica after the last one's; to the one after that if it is full."""

    _turn = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica, in order of its id."""
        in_order = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        self._turn += 1
        return [[in_order[self._turn % len(in_order)]]]
