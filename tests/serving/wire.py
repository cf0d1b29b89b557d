"""HTTP byte by byte, for requests that no client library would send."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

from live_server import LiveServer


@dataclass(frozen=True)
class Reply:
    """An answer. status 0: the connection was closed without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The message of a standard error body; any other body fails the test."""
        assert self.headers["content-type"] == "application/json", self
        error = self.json["error"]
        assert self.json.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}, self
        assert error["code"] and error["type"], self
        assert len(self.body) < 13_000, "the message echoes too much"  # 2,000 characters, six bytes each at worst
        return error["message"]


CLOSED = Reply(0, {}, b"")


def connect(server: LiveServer, timeout: float = 30, receive_buffer: int | None = None) -> socket.socket:
    """Opens a connection. receive_buffer: bytes that the system accepts while the client does not read."""
    client = socket.socket()
    client.settimeout(timeout)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", server.port))
    return client


def read_reply(client: socket.socket, method: str = "POST") -> Reply:
    """Reads the next answer."""
    response = http.client.HTTPResponse(client, method=method)
    try:
        response.begin()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    except (ConnectionError, http.client.RemoteDisconnected, http.client.BadStatusLine):
        return CLOSED
    finally:
        response.close()


def read_replies(client: socket.socket, count: int) -> list[Reply]:
    """Reads the answers of pipelined requests."""
    with client.makefile("rb") as file:
        return [_read_from(file) for _ in range(count)]


def _read_from(file: Any) -> Reply:
    """Reads an answer with a Content-Length."""
    status = int(file.readline().split()[1])
    headers = {key.lower(): value for key, value in http.client.parse_headers(file).items()}
    return Reply(status, headers, file.read(int(headers["content-length"])))


def exchange(server: LiveServer, data: bytes, timeout: float = 30) -> Reply:
    """Sends bytes on a new connection and reads the answer. Raises TimeoutError if there is none."""
    with connect(server, timeout) as client:
        try:
            client.sendall(data)
        except ConnectionError:
            pass  # refused before all was sent
        return read_reply(client)


def head(method: str, path: str, key: str | None, *fields: str) -> bytes:
    """Returns a request's head without its last empty line."""
    lines = [f"{method} {path} HTTP/1.1", "Host: server", *fields]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1")


def post(path: str, body: bytes | object, key: str | None, content_type: str | None = "application/json") -> bytes:
    """Returns a request with a body: bytes unchanged, or an object as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = [f"Content-Length: {len(data)}"] + ([] if content_type is None else [f"Content-Type: {content_type}"])
    return head("POST", path, key, *fields) + b"\r\n" + data
