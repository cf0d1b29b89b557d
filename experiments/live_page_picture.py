"""Photographs the live page of a server under load: `python -m experiments.live_page_picture [--seconds 180]`.

The engine is that of `pool_picture`, with a pool of 300 pages; thirty clients each send one request after the other.
Needs Chromium, and the extra `serve`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import uvicorn

from experiments.pool_picture import tiny_engine
from slora_jax import Engine
from slora_jax.serving.http.app import create_app
from slora_jax.serving.settings import ServerSettings

CLIENTS = 30
WIDTH, HEIGHT = 1240, 1380


def client(url: str, number: int, until: float) -> None:
    """Sends requests of Zipf-like adapters until `until`, in seconds of `time.monotonic`. All prompts for an adapter
    begin with the same 32 tokens."""
    rng = np.random.default_rng(number)
    instructions = np.random.default_rng(0).integers(0, 256, (60, 32)).tolist()
    while time.monotonic() < until:
        adapter = int(60 * rng.power(0.5))
        prompt = instructions[adapter] + rng.integers(0, 256, rng.integers(8, 88)).tolist()
        max_tokens = int(rng.integers(16, 96))
        body = {"model": f"adapter-{adapter}", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        urllib.request.urlopen(request, timeout=60).close()
        time.sleep(rng.exponential(0.3))


def photograph(url: str, output: Path, chromium: str) -> None:
    """The page after a second of its looking."""
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--virtual-time-budget=1500", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run([*command, f"--screenshot={output.absolute()}", url], check=True, capture_output=True)


def engine() -> Engine:
    return tiny_engine(host_adapter_bytes=2_000_000, upload_pages_per_step=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/live_page.png"))
    parser.add_argument("--seconds", type=float, default=180, help="of load before the picture (default: %(default)s)")
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no chromium to open the page with")
    app = create_app(ServerSettings(Path("tiny-llama")), engine)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    serving = threading.Thread(target=server.run)
    serving.start()
    while not server.started or not app.state.service.is_ready:
        time.sleep(0.1)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    until = time.monotonic() + args.seconds + 10
    clients = [threading.Thread(target=client, args=(url, number, until)) for number in range(CLIENTS)]
    for one in clients:
        one.start()
    time.sleep(args.seconds)
    photograph(url, args.output, chromium)
    for one in clients:
        one.join()
    server.should_exit = True
    serving.join()
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
