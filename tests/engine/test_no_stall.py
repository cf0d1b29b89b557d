"""A step never waits for the disk: adapters take 200 ms to read, and others' tokens keep coming."""

import itertools

import numpy as np
import pytest

from experiments.slow_disk import slow_disk
from slora_jax import SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.metrics import serving_metrics

DISK_SECONDS = 0.2
NUM_ADAPTERS = 8
IN_TIME = 8
"""Steps at least during one read. A tiny model's takes 2 ms, so about a hundred are expected; one that waited for the
disk would be the only one."""


@pytest.fixture(scope="module")
def run(tiny):
    """Three base-model requests at any time; one by one, requests for eight adapters that lie on disk."""
    with tiny.engine(host_adapter_bytes=30_000) as engine:
        infos = [
            engine.load_adapter(f"a{i}", random_adapter(tiny.geometry, rank=8, targets=("q", "v"), seed=i))
            for i in range(NUM_ADAPTERS)
        ]
        assert engine.store.stats().spilled >= NUM_ADAPTERS - 3
        params = SamplingParams(max_tokens=80, ignore_eos=True)
        outputs, number = [], itertools.count()
        waiting = [info.name for info in infos if engine.store.tiers()[info.digest] == "disk"]
        on_disk = list(waiting)

        def step() -> None:
            while sum(p.adapter is None for p in engine.core.requests.values()) < 3:
                engine.add_request([2 + next(number) % 200, 7, 11], params)
            outputs.extend(delta.output for delta in engine.step() if delta.output is not None)

        with engine.trace():  # so that both halves pay for it
            for _ in range(300):
                step()
        undisturbed = [o.record() for o in outputs]
        outputs.clear()
        with slow_disk(DISK_SECONDS), engine.trace() as trace:
            while waiting or any(p.adapter is not None for p in engine.core.requests.values()):
                if waiting and all(p.adapter is None for p in engine.core.requests.values()):
                    engine.add_request([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True), waiting.pop(0))
                step()
        yield {
            "undisturbed": undisturbed,
            "loading": [o.record() for o in outputs],
            "on_disk": on_disk,
            "events": trace.events(),
        }


def spans(events, name):
    """`[n, 2]` begin and end in seconds."""
    return np.array([(e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["name"] == name]) / 1e6


def test_every_adapter_comes_from_the_slow_disk_and_its_request_is_answered(run) -> None:
    reads = spans(run["events"], "read")
    assert len(reads) == len(run["on_disk"])
    assert (np.diff(reads) >= DISK_SECONDS).all()
    answered = [r for r in run["loading"] if r.adapter is not None]
    assert [r.adapter for r in answered] == run["on_disk"]
    # A step's clock is read before its plan, so an admission may be dated just before the read's end.
    assert all(r.completed and r.queue_time > 0.9 * DISK_SECONDS for r in answered)


def test_steps_go_on_during_every_read(run) -> None:
    steps = spans(run["events"], "step")
    during = [int(((steps[:, 0] >= a) & (steps[:, 1] <= b)).sum()) for a, b in spans(run["events"], "read")]
    print("whole steps during each read:", during)
    assert min(during) >= IN_TIME, during


def test_the_others_tokens_come_as_without_loads(run) -> None:
    gaps = {
        name: serving_metrics([r for r in run[name] if r.adapter is None]).inter_token_latency
        for name in ("undisturbed", "loading")
    }
    print(gaps)
    # One pause of a busy machine is no stall; reads that stop the others would show in 1 gap of 16.
    assert gaps["loading"].p99 < max(DISK_SECONDS / 2, 3 * gaps["undisturbed"].p99), gaps
