"""Phases of a start are reported to the observer, if one is set."""

import time

import pytest

from slora_jax import phases


@pytest.fixture
def seen():
    seen = []
    phases.observe(lambda name, seconds: seen.append((name, seconds)))
    yield seen
    phases.observe(None)


def test_a_phase_is_reported_with_its_seconds(seen):
    with phases.phase("weights"):
        time.sleep(0.02)
    phases.report("imports", 1.5)
    [(first, seconds), second] = seen
    assert first == "weights" and 0.02 <= seconds < 10
    assert second == ("imports", 1.5)


def test_a_phase_that_fails_is_not_reported(seen):
    with pytest.raises(ValueError), phases.phase("weights"):
        raise ValueError
    assert not seen


def test_nothing_is_reported_unobserved(seen):
    phases.observe(None)
    with phases.phase("weights"):
        pass
    assert not seen


def test_the_process_is_older_than_this_module():
    assert phases.seconds_since_start() > time.monotonic() - phases._imported
