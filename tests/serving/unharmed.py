"""Checks that a server is unchanged after hostile requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from live_server import MANAGE_KEY, SERVE_KEY, LiveServer, until
from wire import exchange

GOOD = {"model": "adapter-1", "prompt": "List all users", "max_tokens": 8, "temperature": 0, "return_token_ids": True}

MEMORY = 400 << 20
"""Bytes by which the server may grow: tokenizing one text of a megabyte takes as much."""


def good_tokens(server: LiveServer) -> list[int]:
    """Returns the tokens of an ordinary request."""
    status, answer = server.post("/v1/completions", GOOD, SERVE_KEY)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def running(server: LiveServer) -> float:
    """Returns how many requests run or wait, by the engine's newest snapshot."""
    values = server.metrics(MANAGE_KEY)
    return values["slora_running_requests", ()] + values["slora_waiting_requests", ()]


@dataclass(frozen=True)
class Before:
    """A server's state: tokens of an ordinary request, size of its log, memory in bytes, open files."""

    tokens: list[int]
    log: int
    memory: int
    files: int

    @classmethod
    def of(cls, server: LiveServer) -> Self:
        tokens = good_tokens(server)
        process = server.psutil()
        return cls(tokens, len(server.log), process.memory_info().rss, process.num_fds())

    def check_answers(self, server: LiveServer) -> None:
        """Checks that an ordinary request is answered as before."""
        assert good_tokens(server) == self.tokens

    def check_all(self, server: LiveServer, memory: int) -> None:
        """Checks that all is released, nothing was compiled, no traceback was logged, and memory grew by fewer than
        `memory` bytes."""
        self.check_answers(server)
        until(lambda: running(server) == 0, "all requests have ended")
        values = server.metrics(MANAGE_KEY)
        pages = {dict(labels)["kind"]: value for (name, labels), value in values.items() if name == "slora_pool_pages"}
        until(lambda: server.metric("slora_pool_pages", MANAGE_KEY, kind="kv") == 0, f"pages are free: {pages}")
        pages = {kind: server.metric("slora_pool_pages", MANAGE_KEY, kind=kind) for kind in pages}
        assert pages["free"] + pages["prefix_idle"] + pages["adapter_idle"] + pages["dummy"] == sum(pages.values())
        assert values["slora_compilations_after_ready_total", ()] == 0
        assert values["slora_engine_faults_total", ()] == 0
        until(lambda: server.psutil().num_fds() <= self.files + 8, "files are closed")
        assert server.psutil().memory_info().rss - self.memory < memory
        assert "Traceback" not in server.log[self.log :], server.log[self.log :]


def refused(server: LiveServer, data: bytes, status: int) -> str:
    """Sends a request that must be refused with a status, and returns the error's message."""
    reply = exchange(server, data)
    assert reply.status == status, reply
    return reply.message
