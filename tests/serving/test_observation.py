"""What is observed agrees with what every owner of pages and adapters says, after every step of a real run."""

import numpy as np
from observed_engine import finished_request, recording

from slora_jax.adapters import AdapterInfo
from slora_jax.serving.observation import PAGE_KINDS, STATES, AdapterUsage, adapter_states


def test_every_page_is_what_its_owner_says() -> None:
    seen: set[int] = set()
    for moment in recording().moments:
        assert np.array_equal(moment.kinds, moment.by_owner)
        counts = np.bincount(moment.kinds, minlength=len(PAGE_KINDS)).tolist()
        assert dict(moment.snapshot.pages) == dict(zip(PAGE_KINDS, counts, strict=True))
        seen |= set(moment.kinds.tolist())
    assert seen == set(range(len(PAGE_KINDS)))  # every kind came about


def test_every_adapter_is_counted_where_it_is() -> None:
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


def test_uploaded_bytes_are_those_of_the_copies_that_the_trace_shows() -> None:
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


def test_usage_counts_finished_requests_and_forgets_unloaded_names() -> None:
    store = Store()
    usage = AdapterUsage(store.has)
    for adapter, queue, tokens in (("a", 1.0, 4), ("a", 3.0, 6), ("a", None, 0), ("c", 0.5, 1), (None, 9.0, 9)):
        usage.finished(finished_request(adapter, tokens, queue))
    states = {state.name: state for state in adapter_states(store, {"y": "pinned"}, usage)}
    assert list(states) == ["c", "a", "b"]  # the one used last first
    assert [states[name].state for name in "abc"] == ["host", "host", "pinned"]
    shown = states["a"].to_json()
    assert (shown["requests"], shown["prompt_tokens"], shown["generated_tokens"]) == (3, 9, 10)
    assert (shown["queue_seconds_mean"], shown["queue_seconds_last"]) == (2.0, 3.0)
    assert states["b"].to_json()["last_used"] is None and states["b"].usage.requests == 0

    del store.names["a"]
    usage.forget("a")
    usage.finished(finished_request("a"))  # was under way when its name was unloaded
    assert len(usage) == 1
    store.names["a"] = "z"
    assert usage.of("a").requests == 0
