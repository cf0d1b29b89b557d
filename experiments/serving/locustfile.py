"""The clients, for locust: `locust -f experiments/serving/locustfile.py --headless --users 64 ...`.

Each user sends a request, reads its events to the end, checks the answer and takes the next request of the list. After
the requests of the warm-up have been answered, the users go through the list once, or for `--for-seconds`.
"""

from __future__ import annotations

import json
import os
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import gevent.event
import tqdm
from locust import FastHttpUser, events, task
from locust.exception import StopUser

from experiments.serving.answers import Answer, Answers, CpuSeconds
from experiments.workloads import WorkloadRequest, read_requests


@events.init_command_line_parser.add_listener
def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--warm-up", type=Path)
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--server", type=int, help="process id")
    parser.add_argument("--for-seconds", type=float, default=0.0, help="0: once through the list")


class WrongAnswerError(Exception):
    """Says what is wrong with an answer."""


class Phase:
    """Requests that users take one by one, and their answers."""

    def __init__(self, requests: list[WorkloadRequest], server: int, for_seconds: float, name: str) -> None:
        self._bodies = [json.dumps(request.body()).encode() for request in requests]
        self.lengths = [request.output for request in requests]
        self._server, self._for_seconds, self._name = server, for_seconds, name
        self._taken = self._unfinished = 0
        self._is_over = False
        self.answers = Answers()
        self.has_ended = gevent.event.Event()

    def take(self) -> tuple[int, bytes] | None:
        """Returns the next request's number and body; None at the end."""
        count = len(self._bodies)
        if not self._taken:
            total = None if self._for_seconds else count
            self._bar = tqdm.tqdm(total=total, desc=self._name, unit="request", leave=False)
            self._cpu, self._start = CpuSeconds.now(self._server, os.getpid()), time.perf_counter()
        self._is_over |= (
            time.perf_counter() - self._start >= self._for_seconds if self._for_seconds else self._taken >= count
        )
        if self._is_over:
            return None
        self._taken += 1
        self._unfinished += 1
        number = (self._taken - 1) % count
        return number, self._bodies[number]

    def done(self, number: int, result: Answer | Exception) -> None:
        """Records the answer to a request, or its failure."""
        self._unfinished -= 1
        self._bar.update()
        if isinstance(result, Answer):
            self.answers.answered.append((number, result))
        else:
            self.answers.failures.append(f"request {number}: {result!r}")
        self.answers.seconds = time.perf_counter() - self._start

    def left(self) -> None:
        """Counts a user without a further request: the last one ends the phase."""
        if not self._unfinished and not self.has_ended.is_set():
            self.answers.cpu = CpuSeconds.now(self._server, os.getpid()).since(self._cpu)
            self._bar.close()
            self.has_ended.set()


class CompletionUser(FastHttpUser):
    """Sends one request after the other, on one connection."""

    network_timeout = connection_timeout = 120.0
    phases: tuple[Phase, ...] = ()

    @task
    def work(self) -> None:
        for phase in self.phases:
            while (taken := phase.take()) is not None:
                number, body = taken
                phase.done(number, self._ask(body, phase.lengths[number]))
            phase.left()
            phase.has_ended.wait()
        raise StopUser

    def _ask(self, body: bytes, length: int) -> Answer | Exception:
        start = time.perf_counter()
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        with self.client.post(
            "/v1/completions", data=body, headers=headers, stream=True, catch_response=True
        ) as response:
            try:
                answer = _read(response, start, length)
            except Exception as error:  # noqa: BLE001  any error is a failure of this request
                response.failure(error)
                return error
            response.request_meta["response_time"] = 1000 * (time.perf_counter() - start)
            response.success()
            return answer


def _read(response: Any, start: float, length: int) -> Answer:
    """Reads every event up to [DONE]. Raises WrongAnswerError, or an error of the connection."""
    if response.status_code != 200:
        raise WrongAnswerError(f"status {response.status_code}: {response.text[:200]}")
    tokens: list[int] = []
    finish_reason = None
    first = last = 0.0
    while True:
        event = response.stream.readline(b"\n\n")
        if not event.startswith(b"data: "):
            raise WrongAnswerError(f"ended without [DONE] after {len(tokens)} tokens: {event[:200]!r}")
        if event == b"data: [DONE]\n\n":
            break
        data = json.loads(event[6:])
        if "error" in data:
            raise WrongAnswerError(str(data["error"]))
        choice = data["choices"][0]
        tokens += choice["token_ids"]
        finish_reason = choice["finish_reason"]
        last = time.perf_counter() - start
        first = first or last
    if finish_reason != "length" or len(tokens) != length:
        raise WrongAnswerError(f"{finish_reason}, {len(tokens)} tokens of {length}")
    if response.stream.readline(b"\n\n"):
        raise WrongAnswerError("something after [DONE]")
    return Answer(tokens, first, last)


@events.test_start.add_listener
def _begin(environment: Any, **_: object) -> None:
    tqdm.tqdm.monitor_interval = 0
    options = environment.parsed_options
    CompletionUser.phases = (
        Phase(read_requests(options.warm_up), options.server, 0.0, "warm-up"),
        Phase(read_requests(options.requests), options.server, options.for_seconds, "locust"),
    )
    gevent.spawn(_quit_at_end, environment)


def _quit_at_end(environment: Any) -> None:
    last = CompletionUser.phases[-1]
    last.has_ended.wait()
    last.answers.write(environment.parsed_options.answers)
    environment.runner.quit()
