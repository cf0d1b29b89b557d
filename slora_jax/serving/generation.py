"""One HTTP request from its checked body to its answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slora_jax.engine import RequestOutput
from slora_jax.scheduling import SamplingParams
from slora_jax.serving.engine_loop import EngineLoop
from slora_jax.serving.errors import JsonResponse, as_api_error
from slora_jax.serving.mailbox import Arrived, Mailbox
from slora_jax.serving.protocol import StreamOptions
from slora_jax.serving.shapes import Json, Shape, counts, usage


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads an answer."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of an HTTP request: a prompt and parameters for each choice, in the answer's order.

    Attributes:
      choices: number of choices for each prompt; they are neighbours.
    """

    prompts: Sequence[list[int]]
    params: Sequence[SamplingParams]
    adapter: str | None
    tenant: str
    choices: int


async def generate(
    request: Request,
    sequences: Sequences,
    shape: Shape,
    stream: StreamOptions | None,
    loop: EngineLoop,
    held: AsyncExitStack,
) -> Response:
    """Runs the sequences and answers in `shape`: as events if `stream` is not None, else when all have ended. Errors up
    to the first token are statuses; later ones are events. A client that goes away cancels its sequences.

    held: what the request holds, to be given back when this returns; an answer that is a stream takes it along.

    Raises:
      ApiError: the service failed, or does not take the request.
    """
    mailbox = Mailbox()
    gone = asyncio.create_task(_until_gone(request, mailbox))
    held.callback(gone.cancel)
    ids = [
        loop.submit(prompt, params, sequences.adapter, sequences.tenant, mailbox, index)
        for index, (prompt, params) in enumerate(zip(sequences.prompts, sequences.params, strict=True))
    ]
    held.callback(loop.cancel, ids)
    try:
        first = await mailbox.take()
        if stream is None:
            return JsonResponse(await _whole(first, mailbox, sequences, shape))
    except ClientGoneError:
        return Response(status_code=499)  # for the log; nobody reads it
    return EventStream(_events(first, mailbox, sequences, shape, stream), held.pop_all())


class EventStream(Response):
    """Server-sent events. What the request holds is given back at the end, however that comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], held: AsyncExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._held = events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(request: Request, mailbox: Mailbox) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    mailbox.fail(ClientGoneError())


async def _whole(arrived: dict[int, Arrived], mailbox: Mailbox, sequences: Sequences, shape: Shape) -> Json:
    wholes: dict[int, Arrived] = {}
    count = len(sequences.prompts)
    while True:
        for index, part in arrived.items():
            if part.output is not None:
                wholes[index] = _all_of(part.output)
        if len(wholes) == count:
            break
        arrived = await mailbox.take()
    choices = [shape.choice(index, wholes[index]) for index in range(count)]
    outputs = [whole.output for _, whole in sorted(wholes.items()) if whole.output is not None]
    return shape.envelope(choices, streamed=False) | {"usage": usage(outputs, sequences.choices)}


def _all_of(output: RequestOutput) -> Arrived:
    return Arrived(output.text or "", output.token_ids, output.logprobs or [], output, output.prompt_logprobs)


async def _events(
    arrived: dict[int, Arrived],
    mailbox: Mailbox,
    sequences: Sequences,
    shape: Shape,
    options: StreamOptions,
) -> AsyncIterator[bytes]:
    """An event a choice for whatever has come, all in one write. Ends with [DONE], or with an error's body."""
    outputs: dict[int, RequestOutput] = {}
    opened: set[int] = set()
    count = len(sequences.prompts)
    prompt_tokens, generated = sum(map(len, sequences.prompts[:: sequences.choices])), 0
    try:
        while True:
            events = []
            for index, part in sorted(arrived.items()):
                if index not in opened:
                    opened.add(index)
                    if (opening := shape.opening(index, part)) is not None:
                        events.append(shape.envelope([opening], streamed=True))
                events.append(shape.envelope([shape.piece(index, part)], streamed=True))
                generated += len(part.token_ids)
                if options.continuous_usage_stats:
                    events[-1]["usage"] = counts(prompt_tokens, generated)
                if part.output is not None:
                    outputs[index] = part.output
            has_ended = len(outputs) == count
            if has_ended and options.include_usage:
                whole = usage([outputs[index] for index in range(count)], sequences.choices)
                events.append(shape.envelope([], streamed=True) | {"usage": whole})
            yield b"".join(map(_event, events)) + (b"data: [DONE]\n\n" if has_ended else b"")
            if has_ended:
                return
            arrived = await mailbox.take()
    except ClientGoneError:
        return
    except Exception as error:  # noqa: BLE001  the status is out already
        yield _event(as_api_error(error).body())


def _event(data: Json) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
