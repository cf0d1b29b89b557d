"""Events of a stream: their JSON, and the two ways to the client, of which neither loses or reorders tokens."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest
from borrowed_engine import in_event_loop
from observed_engine import finished_request

from slora_jax.engine.outputs import Delta
from slora_jax.serving.http.bodies import StreamOptions
from slora_jax.serving.http.connection import WRITER
from slora_jax.serving.http.errors import quoted, to_json
from slora_jax.serving.http.generation import respond
from slora_jax.serving.http.shapes import ChatShape, CompletionShape
from slora_jax.serving.http.token_text import TokenText
from slora_jax.serving.mailbox import Mailbox

TEXT = 'quote " and \\ and é\n'


@pytest.mark.parametrize("kind", [CompletionShape, ChatShape])
def test_json_of_a_plain_event_is_the_encoders(kind: Any) -> None:
    echoes = {"echoes": ["", ""]} if kind is CompletionShape else {}
    shape = kind('m""', TokenText(None), [[1], [1]], **echoes)
    before, after = shape.around(1)
    assert before + quoted(TEXT) + after == shape.event(to_json(shape.piece(1, Delta("", [3], TEXT))))
    assert json.loads(f"{before}{quoted(TEXT)}{after}".removeprefix("data: "))["object"] == shape.chunk_object
    assert shape.is_plain and not kind("m", TokenText(None), [[1], [1]], **echoes, token_ids=True).is_plain


class Writer:
    """A connection that takes no more while `is_open` is False."""

    def __init__(self, sent: list[bytes]) -> None:
        self.is_open, self._sent = True, sent

    def write(self, body: bytes) -> None:
        self._sent.append(body)


@in_event_loop
async def test_tokens_of_a_slow_client_are_joined_in_order() -> None:
    sent: list[bytes] = []
    writer, drained, mailbox = Writer(sent), asyncio.Event(), Mailbox()
    drained.set()

    async def send(message: Any) -> None:
        await drained.wait()
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.Event().wait()

    def step(text: str, output: Any = None) -> None:
        mailbox.put(0, Delta("r", [5], text, output))
        mailbox.deliver()

    shape = CompletionShape("m", TokenText(None), [[1]], echoes=[""])
    step("a")
    async with AsyncExitStack() as held:
        response = await respond(mailbox, shape, 1, StreamOptions(), held)
    serving = asyncio.create_task(response({"type": "http", "extensions": {WRITER: writer}}, receive, send))
    await asyncio.sleep(0.01)  # until it waits for tokens
    step("b")
    step("c")
    writer.is_open = False  # the connection is backed up
    drained.clear()
    step("d")
    await asyncio.sleep(0.01)
    for text in "ef":
        step(text)
    writer.is_open = True  # it takes data again, but the reader has yet to send what it took
    step("g")
    drained.set()
    await asyncio.sleep(0.01)
    step("h")
    step("i", finished_request())
    await serving
    lines = b"".join(sent).decode().split("\n\n")
    assert [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-2]] == ["a", "b", "c", "d", "efg", "h", "i"]
    assert lines[-2:] == ["data: [DONE]", ""]
