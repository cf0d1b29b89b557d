"""Prometheus metrics, read back by prometheus_client's own parser."""

import time
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from observed_engine import finished_request, recording
from prometheus_client.parser import text_string_to_metric_families

from slora_jax.serving.observability.prometheus import INTER_TOKEN_SECONDS, ServerMetrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def metrics():
    made = ServerMetrics(lambda: None, most_adapters=5)
    yield made
    made.close()


def families(metrics: ServerMetrics):
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=")
    return list(text_string_to_metric_families(text.decode()))


def samples(metrics: ServerMetrics) -> Samples:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families(metrics) for s in f.samples}


def growing(metrics: ServerMetrics) -> Samples:
    """Returns samples that must never decrease."""
    found = (f for f in families(metrics) if f.type in ("counter", "histogram"))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in found for s in f.samples}


def test_real_run_is_counted_and_no_counter_decreases() -> None:
    made = recording()
    moment = made.moments[0]
    metrics = ServerMetrics(lambda: moment.snapshot, lambda: moment.tiers)
    before: Samples = {}
    for number, moment in enumerate(made.moments):
        for one in moment.finished:
            metrics.finished(one)
        if number % 25 == 0:
            now = growing(metrics)
            assert all(now[key] >= value for key, value in before.items())
            before = now
    after, outputs, stats = samples(metrics), made.outputs, made.moments[-1].snapshot.stats
    metrics.close()
    assert len(outputs) == 160 == after["slora_requests_total", (("finish_reason", "length"),)]
    for name, seconds in (
        ("time_to_first_token", [o.metrics.first_token - o.metrics.arrival for o in outputs]),
        ("request", [o.metrics.finished - o.metrics.arrival for o in outputs]),
        ("queue", [o.metrics.admitted - o.metrics.arrival for o in outputs]),
        ("inter_token", [b - a for o in outputs for a, b in zip(o.token_times, o.token_times[1:], strict=False)]),
    ):
        assert after[f"slora_{name}_seconds_sum", ()] == pytest.approx(sum(seconds))
        assert after[f"slora_{name}_seconds_count", ()] == len(seconds)
        for key, count in after.items():
            if key[0] == f"slora_{name}_seconds_bucket":
                assert count == sum(second <= float(key[1][0][1]) for second in seconds)
    assert after["slora_prompt_tokens_total", ()] == sum(len(o.prompt_token_ids) for o in outputs)
    assert after["slora_cached_prompt_tokens_total", ()] == sum(o.metrics.cached_tokens for o in outputs) > 0
    assert after["slora_generated_tokens_total", ()] == sum(len(o.token_ids) for o in outputs)
    assert after["slora_request_generated_tokens_sum", ()] == after["slora_generated_tokens_total", ()]
    assert after["slora_upload_bytes_total", ()] == stats.upload_bytes > 0
    assert after["slora_spill_reads_total", ()] == made.moments[-1].snapshot.store.spill_reads > 0
    kinds = {key[1][0][1]: value for key, value in after.items() if key[0] == "slora_pool_pages"}
    assert kinds == dict(moment.snapshot.pages) and sum(kinds.values()) == 300
    assert sum(value for key, value in after.items() if key[0] == "slora_adapters") == 60
    requests = {k[1][0][1]: value for k, value in after.items() if k[0] == "slora_adapter_requests_total"}
    assert requests == Counter(o.adapter for o in outputs) | {"_base": 0, "_other": 0}


def test_every_metric_has_help_and_a_conventional_name() -> None:
    moment = recording().moments[50]
    metrics = ServerMetrics(lambda: moment.snapshot, lambda: moment.tiers)
    metrics.http("/v1/models", "GET", 200, 0.1)
    metrics.refused("queue_full")
    metrics.finished(finished_request("a"))
    text = metrics.render()[0].decode()
    metrics.close()
    helped = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    typed = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")}
    assert helped == set(typed)
    for name, kind in typed.items():
        assert name.startswith(("slora_", "process_")), name
        assert (kind == "counter") == name.endswith("_total"), name
        assert not any(unit in name for unit in ("_ms", "milli", "_kb", "_mb")), name
    documented = [f for f in text_string_to_metric_families(text) if f.samples]
    assert len(documented) > 40 and all(f.documentation for f in documented)
    assert max(Counter((s.name, str(s.labels)) for f in documented for s in f.samples).values()) == 1


def test_ten_thousand_adapters_have_a_bounded_number_of_labels() -> None:
    metrics = ServerMetrics(lambda: None)
    for number in range(10_000):
        metrics.finished(finished_request(f"adapter-{number}"))
    metrics.close()
    found = {key: value for key, value in samples(metrics).items() if key[0] == "slora_adapter_requests_total"}
    assert len(found) == 102 and sum(found.values()) == 10_000
    assert found["slora_adapter_requests_total", (("adapter", "_other"),)] == 9_900
    assert len(metrics.render()[0]) < 100_000


def test_unload_frees_a_label_and_no_sum_decreases(metrics) -> None:
    registered = {f"a{n}" for n in range(8)}
    metrics.adapters._is_registered = registered.__contains__

    def requests() -> dict[str, float]:
        found = samples(metrics).items()
        return {key[1][0][1]: value for key, value in found if key[0] == "slora_adapter_requests_total"}

    for name in ("a0", "a0", "a1", "a2", "a3", "a4", "a5", None):
        metrics.finished(finished_request(name))
    assert requests() == {"a0": 2, "a1": 1, "a2": 1, "a3": 1, "a4": 1, "_other": 1, "_base": 1}
    registered.discard("a0")
    metrics.adapters.forget("a0")
    metrics.finished(finished_request("a0"))  # it was running
    assert requests() == {"a1": 1, "a2": 1, "a3": 1, "a4": 1, "_other": 4, "_base": 1}
    metrics.finished(finished_request("a5"))
    assert requests()["a5"] == 1 and sum(requests().values()) == 10
    began = samples(metrics)["slora_adapter_requests_created", (("adapter", "a5"),)]
    metrics.adapters.forget("a5")
    time.sleep(0.01)
    metrics.finished(finished_request("a5"))
    assert samples(metrics)["slora_adapter_requests_created", (("adapter", "a5"),)] > began  # a reset is visible


def test_labels_follow_the_busiest_adapters(metrics, monkeypatch) -> None:
    def requests() -> dict[str, float]:
        found = samples(metrics).items()
        return {key[1][0][1]: value for key, value in found if key[0] == "slora_adapter_requests_total"}

    for name in ("a0", "a0", "a0", "a1", "a2", "a2", "a3", "a3", "a4", "a4", "late"):
        metrics.finished(finished_request(name))
    assert requests() == {"a0": 3, "a1": 1, "a2": 2, "a3": 2, "a4": 2, "_other": 1, "_base": 0}
    metrics.finished(finished_request("late"))  # twice as busy as a1
    assert requests() == {"a0": 3, "late": 1, "a2": 2, "a3": 2, "a4": 2, "_other": 2, "_base": 0}
    for _ in range(5):
        metrics.finished(finished_request("later"))
    assert "later" not in requests()  # one change in CHANGE_SECONDS
    monkeypatch.setattr("slora_jax.serving.observability.adapter_tally.CHANGE_SECONDS", 0)
    metrics.finished(finished_request("later"))
    assert requests()["later"] == 1 and sum(requests().values()) == 18
    assert len(requests()) == 7 and metrics.adapters.of("late").requests == 2


def test_hostile_names_are_escaped(metrics) -> None:
    names = ['"} 1\nslora_ready 7', "<img src=x onerror=alert(1)>", "back\\slash", "ünïcode", "_other"]
    for name in names:
        metrics.finished(finished_request(name))
    metrics.finished(finished_request("\udcff"))  # a folder's name that is not UTF-8
    found = {key[1][0][1] for key in samples(metrics) if key[0] == "slora_adapter_requests_total"}
    assert found == {*names, "\\udcff", "_base"}
    assert samples(metrics)["slora_ready", ()] == 0


def test_http_refusals_faults_and_readiness(metrics) -> None:
    metrics.http("/v1/completions", "POST", 200, 0.2)
    metrics.http("/v1/completions", "POST", 200, 0.4)
    metrics.http(None, "BREW", 404, 0.001)
    metrics.refused("queue_full")
    metrics.fault()
    metrics.set_ready(True)
    found = samples(metrics)
    route = (("method", "POST"), ("route", "/v1/completions"))
    assert found["slora_http_requests_total", (*route, ("status", "200"))] == 2
    assert found["slora_http_request_seconds_sum", route] == pytest.approx(0.6)
    unmatched = (("method", "other"), ("route", "unmatched"), ("status", "404"))
    assert found["slora_http_requests_total", unmatched] == 1
    assert found["slora_requests_refused_total", (("reason", "queue_full"),)] == 1
    assert found["slora_engine_faults_total", ()] == found["slora_ready", ()] == 1
    metrics.set_ready(False)
    assert samples(metrics)["slora_ready", ()] == 0


def test_compilations_are_counted_before_and_after_ready(metrics) -> None:
    def compile_one(n: float) -> None:
        jax.jit(lambda x: x * n + len(str(n)))(jnp.ones(3)).block_until_ready()

    jnp.ones(3)
    compile_one(1.25)
    at_first = samples(metrics)
    assert at_first["slora_compilations_total", ()] >= 1
    metrics.set_ready(True)
    assert samples(metrics)["slora_compilations_after_ready_total", ()] == 0
    compile_one(2.25)
    later = samples(metrics)
    assert later["slora_compilations_after_ready_total", ()] == 1
    metrics.set_ready(True)  # again, as after a reload
    assert samples(metrics)["slora_compilations_after_ready_total", ()] == 1
    metrics.close()
    compile_one(3.25)
    assert samples(metrics)["slora_compilations_total", ()] == later["slora_compilations_total", ()]


def test_two_servers_in_a_process_do_not_share_counts(metrics) -> None:
    other = ServerMetrics(lambda: None)
    other.refused("draining")
    other.close()
    assert ("slora_requests_refused_total", (("reason", "draining"),)) not in samples(metrics)


def test_bounds_are_inclusive(metrics) -> None:
    metrics.finished(finished_request(tokens=2))  # half a second apart
    metrics.finished(finished_request(tokens=1))  # has no interval
    found = samples(metrics)
    for bound in INTER_TOKEN_SECONDS:
        assert found["slora_inter_token_seconds_bucket", (("le", str(bound)),)] == (bound >= 0.5)
