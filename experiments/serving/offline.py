"""The engine alone, in a process of its own: `python -m experiments.serving.offline`.

The same settings as the server's, from the same file, and the same closed loop as its clients': at most so many
requests are unfinished, and the next one comes when one has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from experiments.serving.answers import Answer, Answers, CpuSeconds
from experiments.workloads import WorkloadRequest, read_requests
from slora_jax import Engine
from slora_jax.serving.settings import ServerSettings


def closed_loop(engine: Engine, requests: Sequence[WorkloadRequest], users: int) -> Answers:
    """Sends all requests to the engine in order, `users` of them at a time."""
    found, numbers, sent = Answers(), {}, {}
    queue = iter(enumerate(requests))
    bar = tqdm(total=len(requests), desc="engine alone", unit="request", leave=False)
    before, start = CpuSeconds.now(os.getpid()), time.perf_counter()

    def send() -> None:
        number, request = next(queue, (None, None))
        if request is not None:
            request_id = engine.add_request(list(request.prompt), request.params(), request.adapter)
            numbers[request_id], sent[request_id] = number, time.perf_counter()

    for _ in range(users):
        send()
    while engine.has_work():
        for delta in engine.step():
            output = delta.output
            if output is None:
                continue
            number, began = numbers.pop(output.request_id), sent.pop(output.request_id)
            if output.finish_reason == "length" and len(output.token_ids) == requests[number].output:
                times = output.token_times
                found.answered.append((number, Answer(output.token_ids, times[0] - began, times[-1] - began)))
            else:
                found.failures.append(f"request {number}: {output.finish_reason} {output.error or ''}")
            bar.update()
            send()
    found.seconds = time.perf_counter() - start
    found.cpu = CpuSeconds.now(os.getpid()).since(before)
    bar.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model_dir", "adapters", "config", "warm_up", "requests", "answers", "stats"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--users", type=int, required=True)
    args = parser.parse_args()
    settings = ServerSettings.from_file(args.config, model_dir=args.model_dir, adapters=args.adapters)
    with settings.build_engine() as engine:
        engine.load_adapters(args.adapters)
        closed_loop(engine, read_requests(args.warm_up), args.users)
        closed_loop(engine, read_requests(args.requests), args.users).write(args.answers)
        engine.check()
        args.stats.write_text(json.dumps(asdict(engine.stats())))


if __name__ == "__main__":
    main()
