"""Runs one HTTP request and answers it, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slora_jax.engine import Delta, RequestOutput
from slora_jax.serving.http.bodies import StreamOptions
from slora_jax.serving.http.connection import WRITER, DirectWriter
from slora_jax.serving.http.errors import JsonResponse, as_api_error, quoted, to_json
from slora_jax.serving.http.shapes import Shape, counts, usage
from slora_jax.serving.mailbox import Mailbox


class ClientGoneError(Exception):
    """The client has closed its connection, so the answer has no reader."""


def on_disconnect(receive: Receive, callback: Callable[[], None]) -> asyncio.Task[None]:
    """Starts a task that calls `callback` when the client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        callback()

    return asyncio.create_task(watch())


async def respond(
    mailbox: Mailbox, shape: Shape, choices: int, stream: StreamOptions | None, held: AsyncExitStack
) -> Response:
    """Answers in `shape` with the sequences that go to `mailbox`.

    Args:
      choices: number of choices for each prompt; they are neighbours.
      stream: None answers when all sequences have ended; otherwise tokens are sent as events. An error before
        the first token sets the HTTP status; a later one is sent as an event.
      held: resources of the request. A stream takes them over, and releases them at its end.

    Raises:
      ApiError: the service failed, or does not accept the request.
    """
    try:
        first = await mailbox.take()
        if stream is None:
            return JsonResponse(await _whole(first, mailbox, shape, choices))
    except ClientGoneError:
        return Response(status_code=499)  # for the log only
    return EventStream(_Events(shape, choices, stream), first, mailbox, held.pop_all())


class EventStream(Response):
    """Server-sent events. Releases the request's resources at the end, whether or not the stream is complete."""

    media_type = "text/event-stream"

    def __init__(self, events: _Events, first: dict[int, Delta], mailbox: Mailbox, held: AsyncExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._first, self._mailbox, self._held = events, first, mailbox, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            writer = scope.get("extensions", {}).get(WRITER)
            if writer is not None:
                self._mailbox.direct = partial(self._write, writer)
            async for event in self._all():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _write(self, writer: DirectWriter, arrived: dict[int, Delta]) -> bool:
        """Writes tokens directly to the connection, unless it is backed up or a sequence has ended."""
        if not writer.is_open:
            return False
        for part in arrived.values():
            if part.output is not None:
                return False
        try:
            writer.write(self._events.encode(arrived))
        except Exception as error:  # noqa: BLE001  sent by `_all`
            self._mailbox.fail(error)
        return True

    async def _all(self) -> AsyncIterator[bytes]:
        """Yields the events that are not written directly. Ends with [DONE], or with an error's body."""
        try:
            arrived = self._first
            while True:
                yield self._events.encode(arrived)
                if self._events.have_ended:
                    return
                arrived = await self._mailbox.take()
        except ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001  the status is sent already
            yield event_of(as_api_error(error).body())


def event_of(data: Mapping[str, Any]) -> bytes:
    """Encodes a server-sent event."""
    return b"data: " + to_json(data).encode() + b"\n\n"


async def outputs_of(mailbox: Mailbox, count: int, arrived: dict[int, Delta] | None = None) -> list[RequestOutput]:
    """Waits for the outputs of all sequences, and returns them by index.

    Args:
      arrived: what was taken from the mailbox before.
    """
    outputs: dict[int, RequestOutput] = {}
    while True:
        outputs |= {index: part.output for index, part in (arrived or {}).items() if part.output is not None}
        if len(outputs) == count:
            return [output for _, output in sorted(outputs.items())]
        arrived = await mailbox.take()


async def _whole(arrived: dict[int, Delta], mailbox: Mailbox, shape: Shape, choices: int) -> dict[str, Any]:
    in_order = await outputs_of(mailbox, len(shape.prompts), arrived)
    done = [shape.choice(index, _all_of(output)) for index, output in enumerate(in_order)]
    return shape.whole(done, usage(in_order, choices))


def _all_of(output: RequestOutput) -> Delta:
    return Delta("", output.token_ids, output.text or "", output, output.logprobs, output.prompt_logprobs)


class _Events:
    """Encodes the events of one stream."""

    def __init__(self, shape: Shape, choices: int, options: StreamOptions) -> None:
        self._shape, self._choices, self._options = shape, choices, options
        self._outputs: dict[int, RequestOutput] = {}
        self._opened: set[int] = set()
        self._around: dict[int, tuple[str, str]] = {}  # of events that differ in text only
        self._prompt_tokens, self._generated = sum(map(len, shape.prompts[::choices])), 0

    @property
    def have_ended(self) -> bool:
        """Returns whether all sequences have ended."""
        return len(self._outputs) == len(self._shape.prompts)

    def encode(self, arrived: dict[int, Delta]) -> bytes:
        """Returns the events of all choices with new tokens and, at the end, the usage and [DONE]."""
        events: list[str] = []
        for index, part in sorted(arrived.items()):
            if part.output is None and (around := self._around.get(index)) is not None:
                events += (around[0], quoted(part.text), around[1])  # the encoder would take longer than all else
            else:
                self._add(events, index, part)
        if self._outputs and self.have_ended:
            if self._options.include_usage:
                in_order = [output for _, output in sorted(self._outputs.items())]
                events.append(self._shape.event("", usage(in_order, self._choices)))
            events.append("data: [DONE]\n\n")
        return "".join(events).encode()

    def _add(self, events: list[str], index: int, part: Delta) -> None:
        """Appends the events of one choice."""
        shape, used = self._shape, None
        if index not in self._opened:
            self._opened.add(index)
            if (opening := shape.opening(index, part)) is not None:
                events.append(shape.event(to_json(opening)))
        if self._options.continuous_usage_stats:
            self._generated += len(part.token_ids)
            used = counts(self._prompt_tokens, self._generated)
        elif shape.is_plain:
            self._around[index] = shape.around(index)
        events.append(shape.event(to_json(shape.piece(index, part)), used))
        if part.output is not None:
            self._outputs[index] = part.output
