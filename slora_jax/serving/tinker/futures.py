"""Results that clients fetch later: `/retrieve_future` waits for one by its request id."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass

from starlette.responses import Response

from slora_jax.serving.http.errors import ApiError, JsonResponse, as_api_error
from slora_jax.serving.tinker.messages import PROTOBUF

POLL_SECONDS = 20.0
"""Longest wait of a fetch; Tinker's client gives up after 45 s, and fetches again after a 408."""
KEEP_SECONDS = 300.0
"""Time for which a fetched result can be fetched again, in case the client did not receive it."""


@dataclass
class _Future:
    task: asyncio.Task[bytes | dict]
    owner: str
    session: str
    fetched: float | None = None


class Futures:
    """Results by request id, until some time after they are fetched or their session ends."""

    def __init__(self) -> None:
        self._futures: dict[str, _Future] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._futures

    def start(self, request_id: str, owner: str, session: str, work: Awaitable[bytes | dict]) -> None:
        """Runs `work` in the background. Its result is a protobuf message or an object for JSON."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # not reported as never retrieved
        self._futures[request_id] = _Future(task, owner, session)

    async def fetch(self, request_id: str, owner: str) -> Response:
        """Returns a result. A failed operation is a result too: an object with `error` and `category`. While the
        operation runs, the answer after some time is 408.

        Raises:
          ApiError: 410, the owner has no such result.
        """
        future = self._futures.get(request_id)
        if future is None or future.owner != owner:
            message = f"request_id={request_id!r}: there is no such result, or it was dropped after it was fetched"
            raise ApiError(410, message, code="no_such_result", param="request_id")
        done, _ = await asyncio.wait({future.task}, timeout=POLL_SECONDS)
        if not done:
            return JsonResponse({"type": "try_again", "request_id": request_id}, 408)
        future.fetched = time.monotonic()
        error = None if future.task.cancelled() else future.task.exception()
        if future.task.cancelled() or error is not None:
            return JsonResponse(_failure(error))
        result = future.task.result()
        return Response(result, media_type=PROTOBUF) if isinstance(result, bytes) else JsonResponse(result)

    def is_busy(self, session: str) -> bool:
        """Returns whether an operation of a session is unfinished."""
        return any(one.session == session and not one.task.done() for one in self._futures.values())

    def sweep(self) -> None:
        """Drops results that were fetched some time ago."""
        now = time.monotonic()
        for request_id, one in list(self._futures.items()):
            if one.fetched is not None and now - one.fetched > KEEP_SECONDS:
                del self._futures[request_id]

    def end(self, session: str) -> None:
        """Drops the finished results of a session."""
        for request_id, one in list(self._futures.items()):
            if one.session == session and one.task.done():
                del self._futures[request_id]


def _failure(error: BaseException | None) -> dict:
    """Returns a failed operation's result. The category is the client's: "user" or "server"."""
    if not isinstance(error, Exception):
        return {"error": "the service is stopping", "category": "server"}
    known = as_api_error(error)
    category = "user" if known.status_code < 500 else "server"
    return {"error": known.body()["error"]["message"], "category": category}
