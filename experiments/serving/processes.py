"""`slora serve` and its load tester as child processes, which end with the block that started them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SERVE = (sys.executable, "-c", "from slora_jax.cli import main; raise SystemExit(main())", "serve")


@contextmanager
def child(command: Sequence[str], log: Path | None = None) -> Iterator[subprocess.Popen]:
    """Runs a command beside the block, and kills it at the block's end. It does not receive Ctrl-C. log: file for its
    output; None: its stderr is this process's, and its stdout is dropped."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(log or os.devnull, "ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out if log else None, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def clients(
    url: str, pid: int, users: int, warm_up: Path, requests: Path, answers: Path, for_seconds: float = 0.0
) -> AbstractContextManager[subprocess.Popen]:
    """Runs locust over `locustfile.py`. pid: the server's. Files as of `write_requests` and `Answers.write`."""
    options: dict[str, object] = {
        "users": users, "spawn-rate": users, "host": url, "server": pid, "warm-up": warm_up, "requests": requests,
        "answers": answers, "for-seconds": for_seconds, "loglevel": "ERROR", "exit-code-on-error": 0,
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items()]
    return child([sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", *given])


def finish(process: subprocess.Popen, what: str) -> None:
    """Waits for a child to end. Raises RuntimeError if it failed."""
    if process.wait() != 0:
        raise RuntimeError(f"{what} ended with status {process.returncode}")


class Server:
    """A running `slora serve`."""

    def __init__(self, process: subprocess.Popen, log: Path, seconds: float) -> None:
        """Returns when the server listens. Raises RuntimeError if it ends, or does not listen within `seconds`."""
        self._process, self._log = process, log
        self._deadline = time.monotonic() + seconds
        while not (found := re.search(r"listening on (http://\S+);", log.read_text(errors="replace"))):
            self._still("listening")
        self.url = found[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Returns when the server accepts requests. Raises RuntimeError as the constructor."""
        while True:
            try:
                self.get("/ready")
                return
            except urllib.error.HTTPError:
                self._still("ready")

    def get(self, path: str) -> str:
        """Returns the body of an answer. Raises urllib.error.HTTPError for a status other than 200."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            text: str = response.read().decode()
            return text

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Returns the samples of /metrics by name and by the values of the labels."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return found

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Returns the exit status. Raises subprocess.TimeoutExpired."""
        return self._process.wait(seconds)

    def stop(self, seconds: float = 60) -> None:
        """Ends the server. Raises RuntimeError if its exit status is not 0."""
        self.signal(signal.SIGTERM)
        if (status := self.wait(seconds)) != 0:
            raise RuntimeError(f"the server ended with status {status}; its log is {self._log}")

    def _still(self, what: str) -> None:
        time.sleep(0.1)
        if self._process.poll() is not None or time.monotonic() > self._deadline:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the server is not {what} (exit status {self._process.poll()}):\n{tail}")


@contextmanager
def serving(arguments: Sequence[str], log: Path, seconds: float = 600) -> Iterator[Server]:
    """Runs `slora serve` with these arguments on a free port, and yields it once it is ready. Kills it at the end of
    the block unless it has ended."""
    log.write_bytes(b"")
    with child([*SERVE, *arguments, "--port", "0"], log) as process:
        server = Server(process, log, seconds)
        server.wait_until_ready()
        yield server
