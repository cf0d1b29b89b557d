"""Snapshots agree with every owner of pages and adapters, after every step of a real run."""

from types import SimpleNamespace

import numpy as np
from observed_engine import finished_request, recording

from slora_jax.adapters import AdapterInfo
from slora_jax.serving.http.endpoints import list_adapters
from slora_jax.serving.observability.prometheus import ServerMetrics
from slora_jax.serving.observability.snapshot import PAGE_KINDS, STATES


def test_every_page_has_the_kind_of_its_owner() -> None:
    seen: set[int] = set()
    for moment in recording().moments:
        assert np.array_equal(moment.kinds, moment.by_owner)
        counts = np.bincount(moment.kinds, minlength=len(PAGE_KINDS)).tolist()
        assert dict(moment.snapshot.pages) == dict(zip(PAGE_KINDS, counts, strict=True))
        seen |= set(moment.kinds.tolist())
    assert seen == set(range(len(PAGE_KINDS)))  # every kind occurred


def test_every_adapter_is_counted_in_its_state() -> None:
    seen: set[str] = set()
    for moment in recording().moments:
        snapshot = moment.snapshot
        assert {d for d, state in snapshot.device.items() if state == "loading"} == moment.loading
        assert {d for d, state in snapshot.device.items() if state == "pinned"} == moment.used
        assert len(snapshot.device) == snapshot.stats.resident_adapters
        counts = snapshot.states(moment.tiers)
        assert tuple(counts) == STATES and sum(counts.values()) == snapshot.store.registered == 60
        away = {tier: [d for d, t in moment.tiers.items() if t == tier and d not in snapshot.device] for tier in STATES}
        assert (counts["host"], counts["disk"]) == (len(away["host"]), len(away["disk"]))
        seen |= {state for state, count in counts.items() if count}
    assert seen == set(STATES)


def test_uploaded_bytes_equal_the_traces_copies() -> None:
    made = recording()
    last = made.moments[-1].snapshot.stats
    assert last.upload_bytes_in_flight == 0 and last.adapter_loads == len(made.copies) > 60
    whole = sum(nbytes for nbytes, given_up in made.copies if not given_up)
    assert whole <= last.upload_bytes <= sum(nbytes for nbytes, _ in made.copies)
    totals = [moment.snapshot.stats.upload_bytes for moment in made.moments]
    assert totals == sorted(totals)


class Store:
    """Two adapters of one content, one of another."""

    def __init__(self) -> None:
        self.names = {"a": "x", "b": "x", "c": "y"}

    def has(self, name: str) -> bool:
        return name in self.names

    def infos(self) -> list[AdapterInfo]:
        return [AdapterInfo(name, digest, 8, (8,) * 7, 3, 300) for name, digest in self.names.items()]

    def tiers(self) -> dict[str, str]:
        return {"x": "host", "y": "disk"}


def test_adapter_list_counts_finished_requests_and_drops_unloaded_names() -> None:
    store = Store()
    metrics = ServerMetrics(lambda: None, is_registered=store.has)
    loop = SimpleNamespace(engine=SimpleNamespace(store=store), snapshot=SimpleNamespace(device={"y": "pinned"}))
    service = SimpleNamespace(loop=loop, metrics=metrics)
    for adapter, queue, tokens in (("a", 1.0, 4), ("a", 3.0, 6), ("a", None, 0), ("c", 0.5, 1), (None, 9.0, 9)):
        metrics.finished(finished_request(adapter, tokens, queue))
    total, entries = list_adapters(service, None, "")
    assert total == 3 and [entry["name"] for entry in entries] == ["c", "a", "b"]  # last used first
    assert [entry["state"] for entry in entries] == ["pinned", "host", "host"]
    _, a, b = entries
    assert (a["requests"], a["prompt_tokens"], a["generated_tokens"]) == (3, 9, 10)
    assert (a["queue_seconds_mean"], a["queue_seconds_last"]) == (2.0, 3.0)
    assert a["aliases"] == ["b"] and b["last_used"] is None and b["requests"] == 0
    assert list_adapters(service, 1, "") == (3, entries[:1]) and list_adapters(service, 5, "x") == (2, [a, b])

    del store.names["a"]
    metrics.adapters.forget("a")
    metrics.finished(finished_request("a"))  # it was running when its name was unloaded
    store.names["a"] = "z"
    assert metrics.adapters.of("a").requests == 0
    metrics.close()
