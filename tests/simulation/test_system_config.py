"""Systems and devices by name."""

import json
from dataclasses import fields, replace
from importlib.resources import files

import pytest
from simulated import SHAPE, device

from slora_jax.errors import ConfigError
from slora_jax.simulation import SYSTEMS, DeviceModel, Efficiency, SystemConfig, devices, load_device, make_system
from slora_jax.simulation.device import SOFTWARE, read_device
from slora_jax.simulation.system import CHANGES

DEVICES = files("slora_jax.simulation") / "devices"


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_baseline_is_its_base_with_what_it_names_changed(name) -> None:
    base = "slora-paper" if name.endswith("-paper") else "slora"
    changed = {"name": name, **CHANGES[name.removesuffix("-paper")]}
    assert make_system(name) == replace(make_system(base), **changed)


def test_the_published_system_has_the_codes_numbers() -> None:
    system = make_system("slora-paper", num_tokens=14500)
    assert (system.step_tokens(14500), system.step_tokens(125000)) == (3072, 20833)
    assert (system.max_num_seqs, system.admit_every, system.page_size) == (1000, 10, 1)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("slora_paper", {}, "'slora_paper' is unknown .did you mean 'slora-paper'.*there are"),
        ("bmm", {"num_token": 1}, "num_token is unknown .did you mean 'num_tokens'"),
        ("bmm", {"num_tokens": 0}, "num_tokens=0"),
        ("bmm", {"page_size": 1.5}, "page_size=1.5"),
        ("slora", {"prefetch": -1}, "prefetch=-1: must be an integer of at least 0"),
        ("slora", {"prefetch": True}, "prefetch=True"),
        ("slora", {"upload_pages_per_step": 0}, "upload_pages_per_step=0"),
        ("slora", {"eviction": "fifo"}, "eviction='fifo': must be 'lru' or 'immediate' or 'cost_aware'"),
        ("slora", {"lora": "magic"}, "lora='magic'"),
        ("slora", {"software": "java"}, "software='java'"),
        ("slora", {"policy": "random"}, "policy='random'"),
        ("slora", {"gpu_memory_utilization": 0.0}, "gpu_memory_utilization=0.0"),
        ("slora", {"disk_bandwidth": 0}, "disk_bandwidth=0"),
        ("slora", {"weights": "int3"}, "weights='int3': must be 'auto' or 'int8' or 'fp8' or 'int4'"),
        ("merge", {"weights": "int8"}, "weights='int8': must be 'auto' with merged adapters"),
    ],
)
def test_a_wrong_setting_is_named(name, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_system(name, **settings)


def test_the_pool_is_what_the_weights_leave() -> None:
    left = 0.5 * device().memory_bytes - SHAPE.weight_bytes
    system = SystemConfig(gpu_memory_utilization=0.5, prefetch=0)
    assert system.pool_tokens(SHAPE, device()) == int(left / SHAPE.kv_bytes)
    assert replace(system, adapter_tokens=1000).pool_tokens(SHAPE, device()) == int(left / SHAPE.kv_bytes - 1000)
    staged = replace(system, prefetch=8, upload_pages_per_step=4, page_size=8).pool_tokens(SHAPE, device())
    assert staged == int(left / SHAPE.kv_bytes - 2 * 4 * 8)
    saved = SHAPE.weight_bytes - replace(SHAPE, weights="int4").weight_bytes
    assert replace(system, weights="int4").pool_tokens(SHAPE, device()) == int((left + saved) / SHAPE.kv_bytes)


def test_narrow_keys_and_values_halve_a_token_and_not_an_adapter() -> None:
    """int8 adds a scale of two bytes to each head of 64 columns."""
    wide, shape = (
        SystemConfig(gpu_memory_utilization=0.5, prefetch=0),
        replace(SHAPE, q_width=128, kv_width=128, head_dim=64),
    )
    narrow = {kind: replace(wide, kv_dtype=kind) for kind in ("fp8", "int8")}
    of = {kind: system.shard_of(shape) for kind, system in narrow.items()}
    assert [2 * of["fp8"].kv_bytes, 64 * of["int8"].kv_bytes] == [shape.kv_bytes, 66 * of["fp8"].kv_bytes]
    tokens = narrow["fp8"].pool_tokens(shape, device())
    assert tokens == pytest.approx(2 * wide.pool_tokens(shape, device()), abs=1)
    assert of["fp8"].lora_bytes == shape.lora_bytes
    for rank in (8, 16, 64):  # in whole tiles, which are half as high
        pages = of["fp8"].adapter_pages(rank, 16)
        assert pages <= 2 * shape.adapter_pages(rank, 16)
        assert pages * 16 * of["fp8"].kv_bytes >= rank * shape.lora_bytes
    with pytest.raises(ConfigError, match="page_size=1: must be even"):
        replace(narrow["fp8"], page_size=1)


def test_there_are_the_papers_devices_and_later_ones() -> None:
    assert {"a100-40", "a100-80", "a10g", "h100", "h200"} <= set(devices())


@pytest.mark.parametrize("name", devices())
def test_a_device_file_has_its_data_sheet_with_sources_and_all_efficiencies(name) -> None:
    content = json.loads((DEVICES / f"{name}.json").read_text())
    ceilings = [field.name for field in fields(DeviceModel)][1:-1]
    assert list(content["data_sheet"]) == ceilings
    assert all("NVIDIA" in entry["source"] for entry in content["data_sheet"].values())
    assert set(content["efficiency"]) == set(SOFTWARE)
    loaded = load_device(name)
    assert loaded.memory_bandwidth == content["data_sheet"]["memory_bandwidth"]["value"]
    assert 1e11 < loaded.memory_bandwidth < 1e13 < loaded.matmul_flops < 1e16
    assert 1e10 < loaded.host_to_device_bandwidth < 1e11 < loaded.vector_flops < loaded.matmul_flops


def test_efficiencies_are_changed_by_name() -> None:
    changed = device().fitted("jax", matmul=0.9)
    assert changed.efficiency["jax"].matmul == 0.9 and changed.efficiency["vllm"].matmul == 0.5
    for software, change, message in (
        ("java", {}, "software='java'"),
        ("jax", {"speed": 1.0}, "speed"),
        ("jax", {"matmul": 1.5}, "matmul=1.5: must be a number in .0, 1."),
        ("jax", {"layer_seconds": -1.0}, "layer_seconds=-1.0: must be a number of at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            device().fitted(software, **change)


def test_an_unknown_or_incomplete_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device 'tpu' is unknown; there are a100-40"):
        load_device("tpu")
    content = json.loads((DEVICES / "a10g.json").read_text())
    del content["data_sheet"]["memory_bytes"]
    with pytest.raises(ConfigError, match="'mine'.*memory_bytes"):
        read_device("mine", content)
    assert {field.name for field in fields(Efficiency)} == set(content["efficiency"]["jax"])
    del content["efficiency"]["jax"]["matmul"]
    with pytest.raises(ConfigError, match="matmul"):
        read_device("mine", content)
