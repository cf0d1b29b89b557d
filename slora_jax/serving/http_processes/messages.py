"""Messages between the engine's process and the HTTP processes, and the channel that carries them.

A message is sent at the end of the event loop's turn together with all others of that turn, so a step of the engine
costs each process one message. What a client wrote is carried as JSON in ASCII: it may hold half of a surrogate pair.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from slora_jax.engine.outputs import TokenLogprobs
from slora_jax.metrics import FinishReason
from slora_jax.serving.http.errors import ApiError, as_api_error


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True, gc=False):
    """Base of all messages. `number` identifies a request of one HTTP process."""


class Hello(Message, frozen=True):
    """The process is connected."""


class Admit(Message, frozen=True):
    """Asks whether a request may begin; answered by `Admitted` or `Failed`.

    Attributes:
      model: JSON of the model's name or null.
      sequences: number of sequences; 0: only the name is checked, and nothing is kept.
    """

    number: int
    client: str
    model: bytes
    sequences: int


class Submit(Message, frozen=True):
    """Starts the sequences of an admitted request.

    Attributes:
      sequences: JSON: for each sequence its prompt's token ids, and fields of `SamplingParams`.
      is_streamed: whether tokens are sent after each step; otherwise only whole outputs are.
    """

    number: int
    sequences: bytes
    tenant: str
    priority: int
    is_streamed: bool


class Release(Message, frozen=True):
    """Ends a request: cancels what still runs, and gives its share back."""

    number: int


class Ask(Message, frozen=True):
    """A whole HTTP request for the engine's process; answered by `Reply` or `Failed`. scope: of ASGI."""

    number: int
    scope: dict[str, Any]
    body: bytes


class Served(Message, frozen=True):
    """An HTTP request has been answered (`limits.OnRequest`)."""

    route: str | None
    method: str
    status: int
    seconds: float


class Refused(Message, frozen=True):
    """A request was refused before it came to the engine."""

    reason: str


class Admitted(Message, frozen=True):
    """The request may begin."""

    number: int


class Failed(Message, frozen=True):
    """A request has failed. error: JSON of `ApiError`'s arguments."""

    number: int
    error: bytes


class Reply(Message, frozen=True):
    """The answer to `Ask`."""

    number: int
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class End(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The fields of a `RequestOutput` that an answer needs. prompt_embedding: bytes of float32 numbers."""

    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    cached_tokens: int
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    prompt_embedding: bytes | None
    error: str | None


class Tokens(Message, frozen=True):
    """New tokens of a sequence (`Delta`)."""

    number: int
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    end: End | None


class Drain(Message, frozen=True):
    """The service stops: no new connection is accepted."""


class Stop(Message, frozen=True):
    """All requests have ended: the HTTP process may end."""


ToEngine = Hello | Admit | Submit | Release | Ask | Served | Refused
ToHttp = Admitted | Failed | Reply | Tokens | Drain | Stop

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_to_http = msgspec.msgpack.Decoder(list[ToHttp]).decode


def failed(number: int, error: Exception) -> Failed:
    """Returns the message of an error, in the form that clients see."""
    one = as_api_error(error)
    fields = {"kind": one.kind, "code": one.code, "param": one.param, "headers": dict(one.headers or {})}
    return Failed(number, json.dumps([one.status_code, str(one.detail), fields]).encode())


def error_of(message: Failed) -> ApiError:
    """Returns the error of a message."""
    status, detail, fields = json.loads(message.error)
    return ApiError(status, detail, **fields)


def socket_of(kind: int, name: bytes | None = None) -> zmq.Socket:
    """Returns a socket whose queues are bounded by the requests that the limits admit, not by a count of messages."""
    made: zmq.Socket = zmq.Context.instance().socket(kind)
    made.set(zmq.LINGER, 0)
    made.set_hwm(0)
    if name is not None:
        made.set(zmq.IDENTITY, name)
    return made


class Outgoing:
    """Messages to one process, sent together at the end of the event loop's turn."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send, self._waiting = send, list[Message]()

    def add(self, message: Message) -> None:
        """Queues a message."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(message)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._send(encode(waiting))


MOST_AT_ONCE = 16
"""Messages that are read in one turn of the event loop. A process whose messages come faster than it handles them still
reads and writes its connections in every turn."""


class Incoming:
    """Reads a socket in the event loop, and passes the parts of all messages that have arrived to `on_messages`."""

    def __init__(self, socket: zmq.Socket, on_messages: Callable[[Sequence[Sequence[bytes]]], None]) -> None:
        self._socket, self._on_messages = socket, on_messages
        self._goes_on = False  # in the next turn
        self._events = asyncio.get_running_loop()
        self._events.add_reader(socket.fileno(), self.read)
        self._events.call_soon(self.read)

    def read(self) -> None:
        """Reads what has arrived. The socket's handle is ready once for several messages, and may be consumed by a
        send, so every sender calls this too."""
        if self._goes_on or self._socket.closed:
            return
        arrived: list[Sequence[bytes]] = []
        try:
            while len(arrived) < MOST_AT_ONCE:
                arrived.append(self._socket.recv_multipart(zmq.NOBLOCK))
            self._goes_on = True
            self._events.call_soon(self._go_on)
        except zmq.Again:
            pass
        if arrived:
            self._on_messages(arrived)

    def _go_on(self) -> None:
        self._goes_on = False
        self.read()

    def close(self) -> None:
        """Closes the socket."""
        self._events.remove_reader(self._socket.fileno())
        self._socket.close()
