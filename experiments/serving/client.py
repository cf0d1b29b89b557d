"""A client of a running server: sends a workload over HTTP, each request at its time, and streams the answers."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from queue import Empty, Queue
from typing import Any
from urllib.parse import urlsplit

from experiments.systems.serving import Done
from experiments.workloads import WorkloadRequest
from slora_jax import ConfigError
from slora_jax.metrics import RequestRecord
from slora_jax.scheduling import FinishReason
from slora_jax.simulation import Arrivals

MAX_CONNECTIONS = 1024
NAP = 0.05
"""Seconds of one wait: a longer one would delay Ctrl-C."""


class RequestFailed(Exception):
    """The server rejected a request, or its answer ended early."""


class Client:
    """A client of a server with OpenAI's API and slora-jax's fields; opens a connection for each request."""

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0) -> None:
        """Checks the URL, `http://HOST:PORT`. key: an API key. timeout: longest silence of the server, in seconds."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ConfigError(f"server.url={url!r}: must be http://HOST:PORT")
        self.url, self._parts, self._timeout = url, parts, timeout
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def models(self) -> tuple[str, list[str]]:
        """Returns the names of the base model and of the adapters, in order.

        Raises:
          ConfigError: no server answers.
        """
        try:
            with self._connection() as connection:
                found = json.load(self._send(connection, "GET", "/v1/models", None))["data"]
        except (OSError, http.client.HTTPException, RequestFailed, ValueError, KeyError) as error:
            raise ConfigError(f"server.url={self.url!r}: {error}; start one with slora serve") from error
        base = next(model["id"] for model in found if model.get("parent") is None)
        return base, sorted(model["id"] for model in found if model.get("parent") is not None)

    def complete(self, model: str, request: WorkloadRequest) -> list[float]:
        """Sends a request. Returns the time of each of its tokens (`time.perf_counter`).

        Raises:
          RequestFailed, OSError, http.client.HTTPException: the request failed.
        """
        times: list[float] = []
        with self._connection() as connection:
            for line in self._send(connection, "POST", "/v1/completions", json.dumps(request.body(model))):
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise RequestFailed(event["error"]["message"])
                times += [time.perf_counter()] * sum(len(choice["token_ids"]) for choice in event["choices"])
        if len(times) != request.output:
            raise RequestFailed(f"the answer has {len(times)} of {request.output} tokens")
        return times

    def _connection(self) -> closing[http.client.HTTPConnection]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        return closing(kind(self._parts.hostname, self._parts.port, timeout=self._timeout))

    def _send(self, connection: Any, method: str, path: str, body: str | None) -> Any:
        connection.request(method, self._parts.path.rstrip("/") + path, body, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RequestFailed(f"status {response.status}: {response.read(2000).decode(errors='replace')}")
        return response


def serve_over_http(
    client: Client, workload: Sequence[WorkloadRequest], models: Sequence[str], done: Done
) -> tuple[list[RequestRecord], list[str]]:
    """Sends each request at its time. Returns a record of each, and descriptions of the failures.

    Args:
      models: the name that each request asks for.
      done: called at the end of each request.
    """
    start = time.perf_counter()
    arrivals = Arrivals(workload)
    records: dict[int, RequestRecord] = {}
    failures: list[str] = []
    ended: Queue[tuple[int, RequestRecord, str | None]] = Queue()

    def ask(number: int, arrival: float) -> None:
        request = workload[number]
        record = RequestRecord(
            f"{number}", request.adapter, len(request.prompt), 0, FinishReason.ERROR, start + arrival, 0.0
        )
        error = None
        try:
            times = client.complete(models[number], request)
            record = replace(
                record, output_tokens=len(times), finish_reason=FinishReason.LENGTH, finished=times[-1],
                admitted=times[0], first_token=times[0], token_times=tuple(times),
            )  # fmt: skip
        except (OSError, http.client.HTTPException, RequestFailed, ValueError, KeyError) as failure:
            record, error = replace(record, finished=time.perf_counter()), f"request {number}: {failure}"
        ended.put((number, record, error))

    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        try:
            while len(records) < len(workload):
                now = time.perf_counter() - start
                for number, arrival in arrivals.until(now):
                    pool.submit(ask, number, arrival)
                try:
                    number, record, error = ended.get(timeout=min(NAP, max(0.001, arrivals.next - now)))
                except Empty:
                    continue
                records[number] = record
                failures += [] if error is None else [error]
                arrivals.ended(number, record.finished - start)
                done()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [records[number] for number in range(len(workload))], failures
