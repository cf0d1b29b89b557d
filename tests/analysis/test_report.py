"""`slora compile-report`: a small model's step programs, compiled for absent GPUs."""

import json
from collections import Counter
from pathlib import Path

import jax
import pytest

from pallas_kernels.devices import DEVICES
from pallas_kernels.targets import TARGETS
from slora_jax import cli
from slora_jax.analysis import report
from slora_jax.engine import EngineConfig
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig

LAYERS = 2
MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
PAGE_BYTES = LAYERS * 2 * 16 * 128 * 2
PARAMETERS = 2 * 512 * 256 + LAYERS * (256 * 512 + 256 * 256 + 3 * 256 * 512)  # in bfloat16, beside norms


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(MODEL))
    return path


def run(model_file: Path, *more: str) -> int:
    options = [f"--model-config={model_file}", "--target=l4", "--max-num-batched-tokens=32", "--max-num-seqs=4", *more]
    return cli.main(["compile-report", *options])


@pytest.fixture(scope="module")
def written(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("report") / "report.json"
    assert run(model_file, f"--json={path}", "--programs=decode_4,mixed_32_lora", "--max-lora-rank=32") == 0
    return json.loads(path.read_text())


def test_the_json_has_the_documented_fields(written) -> None:
    assert (written["target"], written["tensor_parallel_size"]) == ("l4", 1)
    assert [program["name"] for program in written["programs"]] == ["decode_4", "mixed_32_lora"]
    for program in written["programs"]:
        fields = {"tokens", "seqs", "compile_seconds", "argument_bytes", "temp_bytes", "aliased_bytes", "pool_bytes"}
        assert all(program[name] > 0 for name in fields)
        assert program["collectives"] == []
        for kernel in program["kernels"]:
            fields = {"name", "backend", "blocks", "warps", "registers", "spill_bytes", "shared_bytes", "count"}
            assert kernel.keys() == fields
    assert written["problems"] == []


def test_the_pool_takes_its_share_of_the_free_memory(written) -> None:
    pool = written["pool"]
    assert pool["fits"]
    assert pool["page_bytes"] == PAGE_BYTES
    assert pool["bytes"] == pool["num_pages"] * PAGE_BYTES
    assert pool["weight_bytes"] == 2 * PARAMETERS + 4 * (2 * LAYERS + 1) * 256
    assert pool["temp_bytes"] == max(p["temp_bytes"] + p["output_bytes"] for p in written["programs"])
    beside = pool["weight_bytes"] + pool["temp_bytes"] + pool["other_bytes"]
    left = 0.9 * (int(DEVICES["l4"].memory_bytes * 0.75) - beside)
    assert left - 0.1 * pool["temp_bytes"] - 2**20 - PAGE_BYTES < pool["bytes"] <= left
    assert pool["tokens"] == (pool["num_pages"] - 1) * 16
    # Rank 16: one row block a projection. q 2+2, k, v 2+1 (half of 256 is W); o, gate, up 2+2 or 2+4; down 4+2 tiles.
    assert pool["adapter_pages"] == (3 * 2 + 2 + 1 + 1 + 2 + 2 + 2 * 2 + 2 * 4 + 4 + 2) // 2
    assert pool["adapters"] == 4096  # the engine's most slots; memory would hold more


def test_programs_update_the_reported_pool_in_place(written) -> None:
    for program in written["programs"]:
        assert program["pool_bytes"] == written["pool"]["bytes"]
        assert program["aliased_bytes"] >= program["pool_bytes"]
        assert program["argument_bytes"] >= program["pool_bytes"] + written["pool"]["weight_bytes"]
        assert program["copies"] == []


def test_a_step_without_lora_launches_attention_only(written) -> None:
    launches = {p["name"]: Counter({k["name"]: k["count"] for k in p["kernels"]}) for p in written["programs"]}
    assert launches["decode_4"] == {"paged_attention_kernel": LAYERS}
    assert launches["mixed_32_lora"].keys() >= {"paged_attention_kernel", "lora_shrink_kernel", "lora_expand_kernel"}


def test_fewer_layers_and_narrow_keys_are_labelled_and_the_pool_is_for_all_layers(
    model_file, written, tmp_path, capsys
) -> None:
    path = tmp_path / "report.json"
    options = "--layers=1", "--programs=decode_4", "--max-lora-rank=32", "--kv-dtype=int8"
    assert run(model_file, *options, f"--json={path}") == 0
    table = capsys.readouterr().out
    assert f"ONLY 1 of {LAYERS} layers" in table and "bfloat16, int8 keys and values, ranks" in table
    fewer = json.loads(path.read_text())
    assert (fewer["layers"], fewer["compiled_layers"]) == (LAYERS, 1)
    assert fewer["pool"]["weight_bytes"] == written["pool"]["weight_bytes"]
    assert fewer["pool"]["page_bytes"] == PAGE_BYTES // 2 + LAYERS * 2 * 16 * 2 * 2  # scales of two heads
    assert fewer["pool"]["bytes"] == pytest.approx(written["pool"]["bytes"], rel=1e-3)
    assert fewer["programs"][0]["pool_bytes"] == fewer["pool"]["bytes"] // LAYERS


def test_a_pool_that_does_not_fit_is_reported_at_once(model_file, written, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "report.json"
    program = report.ProgramReport(**{**written["programs"][0], "copies": (), "kernels": (), "collectives": ()})
    said = []
    monkeypatch.setattr(report, "_compile", lambda *args: said.append(capsys.readouterr().err) or program)
    assert run(model_file, "--gpu-memory-fraction=0.0001", f"--json={path}") == 0
    assert "DOES NOT FIT: of 0.00 GiB, weights take 0.00 GiB" in said[0]  # before anything is compiled
    assert not any("DOES NOT FIT" in text for text in said[1:])
    assert "DOES NOT FIT" in capsys.readouterr().out
    pool = json.loads(path.read_text())["pool"]
    assert not pool["fits"]
    assert pool["num_pages"] == pool["bytes"] == pool["tokens"] == pool["adapters"] == 0


def test_a_copied_pool_exits_with_status_1(model_file, monkeypatch, capsys) -> None:
    def careless(spec, layout, with_lora):
        """A step that only writes a page, of a pool that is not donated."""
        return jax.jit(lambda params, pool, *rest: tuple(layer.at[3].set(1) for layer in pool))

    monkeypatch.setattr(report, "make_step", careless)
    assert run(model_file, "--layers=1", "--programs=decode_4", "--gpu-memory-fraction=0.01") == 1
    assert "slora: decode_4: the pool is copied" in capsys.readouterr().err


def test_a_spill_is_named_and_exits_with_status_1(model_file, written, monkeypatch, capsys) -> None:
    kernel = report.KernelUse("shrink", "triton", 255, 48, 0, 1, "")
    program = report.ProgramReport(**{**written["programs"][0], "copies": (), "kernels": (kernel,), "collectives": ()})
    pool = report.PoolReport(**written["pool"])
    found = report.CompileReport("l4", 1, "bfloat16", LAYERS, LAYERS, 32, pool, (program,))
    monkeypatch.setattr(report, "compile_report", lambda *args, **kwargs: found)
    assert run(model_file) == 1
    captured = capsys.readouterr()
    assert captured.err == "slora: decode_4: kernel shrink (triton) spills 48 bytes a thread\n"
    assert "shrink (triton)" in captured.out


def test_missing_packages_are_named(monkeypatch) -> None:
    find_spec = report.importlib.util.find_spec
    missing = ("jax_triton", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: name not in missing and find_spec(name))
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32)
    with pytest.raises(ConfigError, match=r"needs JAX's CUDA plugin and jax-triton: .*make install EXTRAS=cuda12"):
        report.compile_report(ModelConfig.from_dict(MODEL), TARGETS["l4"], config)
