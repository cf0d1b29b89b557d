"""The engine's end of the channel: admits, runs and cancels the requests of HTTP processes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from starlette.types import ASGIApp

from slora_jax.engine import RequestOutput
from slora_jax.engine.outputs import Delta
from slora_jax.scheduling import SamplingParams, StructuredOutputs
from slora_jax.serving.http_processes.messages import (
    Admit,
    Admitted,
    Ask,
    Drain,
    End,
    Hello,
    Incoming,
    Outgoing,
    Refused,
    Release,
    Reply,
    Served,
    Stop,
    Submit,
    Tokens,
    decode_to_engine,
    failed,
    socket_of,
)
from slora_jax.serving.mailbox import Mailbox
from slora_jax.serving.replicas.replica import HttpRequest, respond
from slora_jax.serving.service import Service

logger = logging.getLogger("slora_jax.serving")


@dataclass
class _Request:
    """An admitted request of an HTTP process. held: its share, and its sequences once they are submitted."""

    adapter: str | None
    held: ExitStack


@dataclass
class _Peer:
    """An HTTP process."""

    outgoing: Outgoing
    is_connected: bool = False
    requests: dict[int, _Request] = field(default_factory=dict)


class _Outbox(Mailbox):
    """Sends the tokens of a request's sequences to its HTTP process."""

    def __init__(self, outgoing: Outgoing, number: int, is_streamed: bool) -> None:
        super().__init__()
        self._outgoing, self._number, self._is_streamed = outgoing, number, is_streamed

    def put(self, index: int, delta: Delta) -> None:
        output = delta.output
        if output is None and not self._is_streamed:
            return
        end = None if output is None else _end(output, self._is_streamed)
        self._outgoing.add(
            Tokens(self._number, index, delta.token_ids, delta.text, delta.logprobs, delta.prompt_logprobs, end)
        )

    def deliver(self) -> None:
        """Does nothing: the messages of a turn of the event loop are sent together at its end."""

    def fail(self, error: Exception) -> None:
        self._outgoing.add(failed(self._number, error))


class Hub:
    """Serves the HTTP processes. Runs in the event loop of the engine's process."""

    def __init__(self, service: Service, app: ASGIApp, address: Path) -> None:
        """Listens.

        Args:
          app: answers the requests that are forwarded whole.
          address: path of the socket, in a directory that only this user can enter.
        """
        self._service, self._app = service, app
        self._peers: dict[bytes, _Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket = socket_of(zmq.ROUTER)
        self._socket.bind(f"ipc://{address}")
        self._incoming = Incoming(self._socket, self._received)

    def add(self, name: bytes) -> None:
        """Expects a process."""
        self._peers[name] = _Peer(Outgoing(lambda data: self._send(name, data)))

    def remove(self, name: bytes) -> None:
        """Cancels the requests of a process that has ended."""
        peer = self._peers.pop(name, None)
        while peer is not None and peer.requests:
            _, request = peer.requests.popitem()
            request.held.close()

    def is_connected(self, name: bytes) -> bool:
        """Returns whether a process gets messages yet."""
        return name in self._peers and self._peers[name].is_connected

    def drain(self) -> None:
        """Makes all processes refuse new connections."""
        self._broadcast(Drain())

    def stop(self) -> None:
        """Makes all processes end when their answers are sent."""
        self._broadcast(Stop())

    def close(self) -> None:
        """Stops listening."""
        for task in self._tasks:
            task.cancel()
        self._incoming.close()

    def _broadcast(self, message: Drain | Stop) -> None:
        for peer in self._peers.values():
            peer.outgoing.add(message)

    def _send(self, name: bytes, data: bytes) -> None:
        if self._socket.closed:
            return
        self._socket.send_multipart([name, data])  # dropped if the process has ended
        self._incoming.read()

    def _received(self, arrived: Sequence[Sequence[bytes]]) -> None:
        for name, data in arrived:
            peer = self._peers.get(name)
            if peer is not None:  # else it has been removed
                self._handle(peer, data)

    def _handle(self, peer: _Peer, data: bytes) -> None:
        for message in decode_to_engine(data):
            match message:
                case Hello():
                    peer.is_connected = True
                case Admit():
                    self._admit(peer, message)
                case Submit():
                    self._start(self._submit(peer, message))
                case Release():
                    request = peer.requests.pop(message.number, None)
                    if request is not None:
                        request.held.close()
                case Ask():
                    self._start(self._answer(peer, message))
                case Served():
                    self._service.metrics.http(message.route, message.method, message.status, message.seconds)
                case Refused():
                    self._service.metrics.refused(message.reason)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _admit(self, peer: _Peer, message: Admit) -> None:
        model, held = json.loads(message.model), ExitStack()
        try:
            if message.sequences:
                adapter = self._service.hold(held, message.client, model, message.sequences)
                peer.requests[message.number] = _Request(adapter, held)
            else:
                self._service.adapter_named(model)
        except Exception as error:  # noqa: BLE001  reported to the client
            peer.outgoing.add(failed(message.number, error))
        else:
            peer.outgoing.add(Admitted(message.number))

    async def _submit(self, peer: _Peer, message: Submit) -> None:
        try:
            sequences = [(prompt, _params(fields)) for prompt, fields in json.loads(message.sequences)]
            for form in {params.structured_outputs for _, params in sequences}:
                if isinstance(form, StructuredOutputs):  # compiled in a thread, so that the engine finds it
                    await self._service.of_text(self._service.engine.grammars.compile, form)
            request = peer.requests.get(message.number)
            if request is None:
                return  # released while its grammar was compiled
            prompts, params = [prompt for prompt, _ in sequences], [params for _, params in sequences]
            outbox = _Outbox(peer.outgoing, message.number, message.is_streamed)
            self._service.start(
                request.held, prompts, params, request.adapter, message.tenant, outbox, message.priority
            )
        except Exception as error:  # noqa: BLE001  reported to the client
            peer.outgoing.add(failed(message.number, error))

    async def _answer(self, peer: _Peer, message: Ask) -> None:
        scope = message.scope | {"headers": [(name, value) for name, value in message.scope["headers"]]}
        status, headers, body = 0, [], b""
        try:
            async for sent in respond(self._app, HttpRequest(scope, message.body)):
                for one in sent:
                    if one["type"] == "http.response.start":
                        status, headers = one["status"], [(name, value) for name, value in one["headers"]]
                    else:
                        body += one.get("body", b"")
        except Exception as error:  # noqa: BLE001  reported to the client
            if not status:  # the app answers its own errors before it raises them
                peer.outgoing.add(failed(message.number, error))
                return
        peer.outgoing.add(Reply(message.number, status, headers, body))


def _params(fields: dict[str, Any]) -> SamplingParams:
    """Returns parameters from the fields that JSON has kept."""
    return SamplingParams(**fields | {"logit_bias": {token: bias for token, bias in fields["logit_bias"]}})


def _end(output: RequestOutput, is_streamed: bool) -> End:
    """Returns what is sent of an output. A stream has had its text and log-probabilities already."""
    vector = output.prompt_embedding
    return End(
        text=None if is_streamed else output.text,
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,
        cached_tokens=output.metrics.cached_tokens,
        logprobs=None if is_streamed else output.logprobs,
        prompt_logprobs=None if is_streamed else output.prompt_logprobs,
        prompt_embedding=None if vector is None else vector.astype("<f4").tobytes(),
        error=output.error,
    )
