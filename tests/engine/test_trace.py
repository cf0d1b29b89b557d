"""A traced run: a valid trace file whose counts agree with the engine's; without a trace, nothing is recorded."""

import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from slora_jax import Engine, RequestError, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.engine import trace as trace_module
from slora_jax.engine.trace import NoTrace
from slora_jax.metrics import PAGE_KINDS, adapter_metrics, serving_metrics

NUM_ADAPTERS = 12
KINDS = set(PAGE_KINDS)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Forty requests over twelve adapters; the pool holds at most four of them and host memory three."""
    path = tmp_path_factory.mktemp("trace") / "deeper" / "run.json"
    rng = np.random.default_rng(0)
    with tiny.engine(host_adapter_bytes=200_000) as engine:
        for i in range(NUM_ADAPTERS):
            engine.load_adapter(f"a{i}", random_adapter(tiny.geometry, rank=8 + 8 * (i % 2), seed=i))
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        names = [None if i % 5 == 0 else f"a{rng.integers(NUM_ADAPTERS)}" for i in range(40)]
        prompts = [rng.integers(2, 250, rng.integers(3, 30)).tolist() for _ in names]
        engine.generate(prompts[:3], params, names[:3])  # not traced: some adapters are resident already
        before, reads = engine.stats(), engine.store.stats().spill_reads
        with engine.trace(path) as trace:
            outputs = engine.generate(prompts, params, names)
        after = engine.stats()
        yield {
            "events": json.loads(path.read_text())["traceEvents"],
            "trace": trace,
            "outputs": outputs,
            "capacity": engine.allocator.capacity,
            "steps": after.steps - before.steps,
            "loads": after.adapter_loads - before.adapter_loads,
            "evictions": after.adapter_evictions - before.adapter_evictions,
            "reads": engine.store.stats().spill_reads - reads,
            "nbytes": {info.name: info.nbytes for info in engine.adapters()},
        }


def complete_events(events):
    """Returns complete events by track."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    return tracks


def test_every_event_has_the_formats_fields_and_times_never_go_back(run) -> None:
    for event in run["events"]:
        assert event["ph"] in "MXC"
        assert {"name", "ph", "pid", "tid" if event["ph"] != "C" else "ts", "args"} <= event.keys()
    timed = [event for event in run["events"] if event["ph"] != "M"]
    times = np.array([event["ts"] for event in timed])
    assert times[0] >= 0
    assert (np.diff(times) >= 0).all()
    assert all(event["dur"] >= 0 for event in timed if event["ph"] == "X")


def test_events_of_a_track_nest(run) -> None:
    tracks = complete_events(run["events"])
    assert {"host", "adapter uploads", "device, even steps", "device, odd steps"} <= tracks.keys()
    for name, events in tracks.items():
        open_until: list[float] = []
        for event in events:
            while open_until and open_until[-1] <= event["ts"] + 1e-6:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + 1e-6, f"{event} on track {name!r} crosses its parent's end"
            open_until.append(end)
            assert len(open_until) <= (2 if name == "host" else 1)


def test_a_step_is_scheduled_then_dispatched_and_the_one_before_is_read(run) -> None:
    host = complete_events(run["events"])["host"]
    steps = [e for e in host if e["name"] == "step"]
    parts = [e["name"] for e in host if steps[3]["ts"] < e["ts"] < steps[3]["ts"] + steps[3]["dur"]]
    assert parts == ["schedule", "dispatch", "wait for device", "outputs"]
    assert Counter(e["name"] for e in host)["dispatch"] == run["steps"]


def test_every_step_is_in_flight_from_its_dispatch_until_the_next_one_is_dispatched(run) -> None:
    tracks = complete_events(run["events"])
    flights = sorted(tracks["device, even steps"] + tracks["device, odd steps"], key=lambda e: int(e["name"][5:]))
    assert [e["name"] for e in flights] == [f"step {i}" for i in range(run["steps"])]
    dispatches = [e["ts"] + e["dur"] for e in tracks["host"] if e["name"] == "dispatch"]
    assert all(dispatched <= e["ts"] for dispatched, e in zip(dispatches, flights, strict=True))
    overlapped = sum(a["ts"] + a["dur"] > b["ts"] for a, b in itertools.pairwise(flights))
    assert overlapped > len(flights) / 2  # the next step is dispatched before the last one is read
    assert sum(e["args"]["uploads"] for e in flights) == run["loads"]


def test_every_load_is_an_upload_with_its_bytes(run) -> None:
    tracks = complete_events(run["events"])
    uploads = [event for name, track in tracks.items() if name.startswith("adapter uploads") for event in track]
    assert len(uploads) == run["loads"] > NUM_ADAPTERS
    assert not any(e["args"]["given_up"] for e in uploads)
    assert all(e["args"]["bytes"] == run["nbytes"][e["name"]] for e in uploads)


def test_disk_reads_are_on_the_track_of_the_stores_thread(run) -> None:
    tracks = complete_events(run["events"])
    reads = [e for e in tracks["disk: slora-adapters"] if e["name"] == "read"]
    assert len(reads) == run["reads"] > 0
    assert {e["args"]["bytes"] for e in reads} <= set(run["nbytes"].values())
    assert not [name for name in tracks if name.startswith("disk") and name != "disk: slora-adapters"]


def test_page_counters_sum_to_the_pool_and_queue_counters_to_the_requests(run) -> None:
    counters = [e for e in run["events"] if e["ph"] == "C"]
    pools = [e["args"] for e in counters if e["name"].startswith("pool")]
    assert all(set(pages) == KINDS and sum(pages.values()) == run["capacity"] for pages in pools)
    assert all(max(pages[kind] for pages in pools) > 0 for kind in KINDS)
    queues = [e["args"] for e in counters if e["name"].startswith("queues")]
    assert len(queues) == len(pools) == len(run["trace"].samples)
    assert max(q["running"] + q["waiting"] for q in queues) > 30
    assert queues[-1] == {"running": 0, "waiting": 0}


def test_pool_stays_agree_with_the_engines_counters(run) -> None:
    trace, records = run["trace"], [output.record() for output in run["outputs"]]
    by_name = adapter_metrics(records, trace.stays(), trace.start, trace.samples[-1].time)
    assert sum(a.loads for a in by_name.values()) == run["loads"]
    assert sum(a.evictions for a in by_name.values()) == run["evictions"] > 0
    used = Counter(output.adapter for output in run["outputs"])
    assert {name: a.requests for name, a in by_name.items() if a.requests} == used
    assert all(by_name[name].resident_seconds > 0 for name in used if name is not None)
    last = trace.samples[-1].pages
    assert sum(s.pages for s in trace.stays() if s.evicted is None) == last.adapter_in_use + last.adapter_idle


def test_token_times_of_the_outputs_span_first_token_to_finish(run) -> None:
    for output in run["outputs"]:
        assert len(output.token_times) == len(output.token_ids)
        assert output.token_times[0] == output.metrics.first_token
        assert output.token_times[-1] == output.metrics.finished
        assert (np.diff(output.token_times) > 0).all()
    metrics = serving_metrics([output.record() for output in run["outputs"]])
    assert (metrics.requests, metrics.aborted, metrics.inter_token_latency.count) == (40, 0, 40 * 11)


def test_engine_without_a_trace_records_nothing(engine: Engine, monkeypatch) -> None:
    """(Not by `tracemalloc`: CPython before 3.12.9 may crash when it is stopped while XLA's threads run.)"""
    made = []
    monkeypatch.setattr(trace_module, "pool_pages", lambda *args: made.append(args))  # called by a trace in every step
    engine.add_request([3, 4, 5], SamplingParams(max_tokens=20, ignore_eos=True))
    while engine.has_work():
        engine.step()
    assert not made
    nothing = {id(NoTrace().step()), id(NoTrace().span("a")), id(NoTrace().upload(None))}
    assert len(nothing) == 1  # one context manager for every use


def test_trace_may_start_and_stop_while_requests_run(engine: Engine, tmp_path) -> None:
    engine.add_request([3, 4, 5], SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(4):
        engine.step()
    with pytest.raises(ZeroDivisionError), engine.trace(tmp_path / "part.json") as trace:
        for _ in range(5):
            engine.step()
        with pytest.raises(RequestError, match="a recording is under way"), engine.trace():
            pass
        raise ZeroDivisionError  # the recording is written all the same
    while engine.has_work():
        engine.step()
    tracks = complete_events(json.loads((tmp_path / "part.json").read_text())["traceEvents"])
    flights = tracks["device, even steps"] + tracks["device, odd steps"]
    assert len(flights) == 4  # the first was dispatched before, the last is not read yet
    assert len(trace.samples) == 6
