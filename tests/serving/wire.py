"""HTTP byte by byte: what no client library would send, and what came back for it."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

from live_server import LiveServer


@dataclass(frozen=True)
class Reply:
    """An answer. status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """Of the standard error body, which this must be."""
        assert self.headers["content-type"] == "application/json", self
        error = self.json["error"]
        assert self.json.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}, self
        assert error["code"] and error["type"], self
        assert len(self.body) < 13_000, "the message echoes too much"  # 2,000 characters, six bytes each at worst
        return error["message"]


CLOSED = Reply(0, {}, b"")


def connect(server: LiveServer, timeout: float = 30, receive_buffer: int | None = None) -> socket.socket:
    """A connection. receive_buffer: bytes that the system takes while nobody reads."""
    client = socket.socket()
    client.settimeout(timeout)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", server.port))
    return client


def read_reply(client: socket.socket, method: str = "POST") -> Reply:
    """The next answer."""
    response = http.client.HTTPResponse(client, method=method)
    try:
        response.begin()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    except (ConnectionError, http.client.RemoteDisconnected, http.client.BadStatusLine):
        return CLOSED
    finally:
        response.close()


def read_replies(client: socket.socket, count: int) -> list[Reply]:
    """Answers to requests that were sent one behind the other."""
    with client.makefile("rb") as file:
        return [_read_from(file) for _ in range(count)]


def _read_from(file: Any) -> Reply:
    """An answer with a Content-Length."""
    status = int(file.readline().split()[1])
    headers = {key.lower(): value for key, value in http.client.parse_headers(file).items()}
    return Reply(status, headers, file.read(int(headers["content-length"])))


def exchange(server: LiveServer, data: bytes, timeout: float = 30) -> Reply:
    """Sends bytes on a new connection. TimeoutError: nothing comes back."""
    with connect(server, timeout) as client:
        try:
            client.sendall(data)
        except ConnectionError:
            pass  # refused before all was sent
        return read_reply(client)


def head(method: str, path: str, key: str | None, *fields: str) -> bytes:
    """A request's head without its last empty line."""
    lines = [f"{method} {path} HTTP/1.1", "Host: server", *fields]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1")


def post(path: str, body: bytes | object, key: str | None, content_type: str | None = "application/json") -> bytes:
    """A request with a body, bytes as they are or an object as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = [f"Content-Length: {len(data)}"] + ([] if content_type is None else [f"Content-Type: {content_type}"])
    return head("POST", path, key, *fields) + b"\r\n" + data
