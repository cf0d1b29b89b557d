"""Adapters that change, are damaged or overflow while others are served: the others' tokens do not change."""

import os
import warnings

import numpy as np
import pytest

from slora_jax import AdapterError, SamplingParams
from slora_jax.adapters import LoraAdapter, random_adapter, write_peft
from slora_jax.adapters.peft_format import adapter_of
from slora_jax.adapters.targets import Target
from slora_jax.adapters.untrusted.tensor_file import TensorFile

WEIGHTS = "adapter_model.safetensors"
LONG = SamplingParams(max_tokens=24, ignore_eos=True)


def test_content_at_registration_is_served_although_its_directory_changes(six, tmp_path) -> None:
    six.load(six.names, tmp_path)
    for name in "abf":  # "f" is in memory, the others are spilled
        write_peft(tmp_path / name, six.weights("x"))
    os.truncate(tmp_path / "c" / WEIGHTS, 100)
    (tmp_path / "d" / "adapter_config.json").unlink()
    six.assert_right(six.serve([*six.names, None]), six.expected)


def test_file_truncated_during_the_load_is_an_error(six, tmp_path, monkeypatch) -> None:
    six.load("ac")
    file = write_peft(tmp_path / "b", six.weights("b")) / WEIGHTS
    read = TensorFile.read

    def truncate_and_read(tensors, name):
        if file.stat().st_size > 4096:
            os.truncate(file, 4096)
        return read(tensors, name)

    def load() -> None:
        with monkeypatch.context() as patch, pytest.raises(AdapterError) as caught:
            patch.setattr(TensorFile, "read", truncate_and_read)
            six.engine.load_adapter("b", tmp_path / "b")
        assert f"{file}: tensor " in str(caught.value) and "truncated while it was read" in str(caught.value)

    six.assert_right(six.serve(["a", None], load, "c"), ["a", "base", "c"])


# Damaged adapters beside good ones


def test_bad_adapters_in_a_folder_are_named_and_skipped(six, tmp_path) -> None:
    for name in "abcdef":
        write_peft(tmp_path / name, six.weights(name))
    os.truncate(tmp_path / "b" / WEIGHTS, 1000)
    (tmp_path / "d" / "adapter_config.json").unlink()
    content = bytearray((tmp_path / "e" / WEIGHTS).read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / "e" / WEIGHTS).write_bytes(content)
    (tmp_path / "f" / WEIGHTS).unlink()
    (tmp_path / "f" / WEIGHTS).mkdir()

    def load() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            infos = six.engine.load_adapters(tmp_path)
        assert [info.name for info in infos] == ["a", "c"]
        messages = [str(warning.message) for warning in caught]
        reasons = {"b": "not a valid safetensors file", "d": "adapter_config.json: no such file", "e": "found NaN"}
        reasons["f"] = f"{WEIGHTS}: cannot be read: not a regular file"
        assert len(messages) == 4
        for message, (name, reason) in zip(messages, reasons.items(), strict=True):
            assert f"adapter {name!r} skipped: {tmp_path / name}" in message and reason in message

    six.load("a")  # loaded again from the folder while it runs
    six.assert_right(six.serve(["a", None], load, "c"), ["a", "base", "c"])


def test_reloading_a_folder_frees_the_pages_of_replaced_adapters(engine, tiny, tmp_path) -> None:
    for seed in (1, 2):
        write_peft(tmp_path / "x", random_adapter(tiny.geometry, 4, seed=seed))
        engine.load_adapters(tmp_path)
        assert engine.stats().pages.adapter == 0
        engine.generate([[5, 6]], LONG, "x")


# Overflow


def exploding(adapter: LoraAdapter) -> LoraAdapter:
    """Returns finite weights under which hidden states overflow to infinity and NaN."""
    targets = {key: Target(len(a), adapter.scales[key]) for key, a in adapter.a.items()}
    b = {key: matrix * np.float32(1e30) for key, matrix in adapter.b.items()}
    return adapter_of(adapter.config, targets, adapter.a, b, len(adapter.ranks))


@pytest.fixture
def explosive(engine, tiny):
    """Loads three good adapters, and "nan", whose hidden states are NaN. Returns a function that serves requests for
    the good ones and the base model, with or without requests for "nan" between them."""
    for name, rank in (("a", 4), ("b", 7), ("c", 16)):
        engine.load_adapter(name, random_adapter(tiny.geometry, rank, seed=rank))
    engine.load_adapter("nan", exploding(random_adapter(tiny.geometry, 5, seed=5)))

    def serve(rng: np.random.Generator, bad: bool) -> tuple[dict, dict]:
        wanted, unwanted = {}, {}
        for number in range(40):
            prompt = rng.integers(2, 300, rng.choice([1, 7, 8, 30])).tolist()
            temperature = float(rng.choice([0.0, 0.8]))
            params = SamplingParams(max_tokens=6, temperature=temperature, seed=number, ignore_eos=True, logprobs=1)
            good, adapter = number % 3 != 1, [None, "a", "b", "c"][rng.integers(4)]
            if good or bad:
                request = engine.add_request(prompt, params, adapter if good else "nan", request_id=str(number))
                (wanted if good else unwanted)[request] = None
            for _ in range(rng.integers(3)):
                step(wanted, unwanted)
        while engine.has_work():
            step(wanted, unwanted)
        return wanted, unwanted

    def step(*outputs: dict) -> None:
        for delta in engine.step():
            for some in outputs:
                if delta.request_id in some and delta.output is not None:
                    some[delta.request_id] = delta.output

    return serve


def test_overflow_under_one_adapter_does_not_reach_other_requests(explosive, seed) -> None:
    """Rows of both are in the same products, and pages are reused; 0 * NaN would be NaN."""
    expected, _ = explosive(np.random.default_rng(seed), bad=False)
    found, exploded = explosive(np.random.default_rng(seed), bad=True)
    assert len(exploded) == 13
    for output in exploded.values():
        assert output.finish_reason == "error" and "adapter 'nan': the logits of output token" in output.error
        assert output.token_ids == [] and output.logprobs == []
    assert {r: o.token_ids for r, o in found.items()} == {r: o.token_ids for r, o in expected.items()}
    for request, output in found.items():
        np.testing.assert_allclose(
            [p.logprob for p in output.logprobs], [p.logprob for p in expected[request].logprobs], rtol=1e-4, atol=1e-4
        )


def test_pages_of_a_request_without_finite_logits_are_not_shared(engine, tiny) -> None:
    engine.load_adapter("nan", exploding(random_adapter(tiny.geometry, 5, seed=5)))
    for _ in range(2):
        outputs = engine.generate([list(range(2, 42))] * 2, LONG, "nan")
        assert [output.finish_reason for output in outputs] == ["error"] * 2
        assert outputs[0].metrics.cached_tokens == 0, "the second begins while the first one runs"
        assert engine.stats().pages.prefix == 0
