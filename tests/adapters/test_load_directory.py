"""Loading a folder of adapters: all are registered, within time and memory; damaged ones are reported."""

import json
import subprocess
import sys
import time

import pytest

from slora_jax.adapters import AdapterStore, BaseGeometry, random_adapter, write_peft
from slora_jax.errors import AdapterError


@pytest.fixture
def folder(geometry, tmp_path):
    for i in range(6):
        write_peft(tmp_path / "adapters" / f"a{i}", random_adapter(geometry, 2 + i, seed=i))
    return tmp_path / "adapters"


def test_every_adapter_is_registered_under_its_folders_name(geometry, folder):
    (folder / "notes").mkdir()
    (folder / "README.md").write_text("not an adapter")
    with AdapterStore(geometry, "bfloat16", 10**9) as store:
        infos, errors = store.load_directory(folder, progress=False)
        assert [(info.name, info.rank) for info in infos] == [(f"a{i}", 2 + i) for i in range(6)] and errors == []
        assert store.tiers() == {info.digest: "host" for info in infos}


def test_damaged_adapters_are_reported_and_others_registered(geometry, folder):
    (folder / "a0" / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    config = folder / "a1" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_qalora": True}))
    (folder / "a2" / "adapter_config.json").unlink()
    (folder / "a3" / "adapter_model.safetensors").rename(folder / "a3" / "adapter_model.bin")
    with AdapterStore(geometry, "float32", 10**9) as store:
        infos, errors = store.load_directory(folder, progress=False)
        assert [info.name for info in infos] == ["a4", "a5"]
        reasons = ("not a valid safetensors file", "use_qalora", "no such file", "unpickling")
        assert [name for name, _ in errors] == ["a0", "a1", "a2", "a3"]
        for (name, error), reason in zip(errors, reasons, strict=True):
            assert isinstance(error, AdapterError) and reason in str(error) and str(folder / name) in str(error)


def test_folder_one_level_too_high_or_low_is_reported(geometry, folder, tmp_path):
    with AdapterStore(geometry, "float32", 10**9) as store:
        infos, [(name, error)] = store.load_directory(tmp_path, progress=False)
        assert infos == [] and name == "adapters" and "holds adapters" in str(error)
        infos, [(name, error)] = store.load_directory(folder / "a0", progress=False)
        assert infos == [] and name == "a0" and "is an adapter itself" in str(error)


def test_unexpected_error_of_one_adapter_is_reported(geometry, folder, monkeypatch):
    from slora_jax.adapters import store as module

    def read(directory, *args):
        if directory.name == "a3":
            raise MemoryError("out of memory")
        return original(directory, *args)

    original = module.read_peft
    monkeypatch.setattr(module, "read_peft", read)
    with AdapterStore(geometry, "float32", 10**9) as store:
        infos, errors = store.load_directory(folder, progress=False)
    assert len(infos) == 5 and [name for name, _ in errors] == ["a3"] and "out of memory" in str(errors[0][1])


def test_progress_is_shown_only_when_asked_for(geometry, folder, capsys):
    for progress in (True, False):
        with AdapterStore(geometry, "float32", 10**9) as store:
            store.load_directory(folder, progress=progress)
        assert ("6/6" in capsys.readouterr().err) == progress


def test_root_that_is_not_a_directory_is_refused(geometry, tmp_path):
    with AdapterStore(geometry, "float32", 10**9) as store, pytest.raises(AdapterError, match="not a directory"):
        store.load_directory(tmp_path / "nowhere")


MEMORY_PROBE = """
import gc, sys
from pathlib import Path
import psutil
from slora_jax.adapters import AdapterStore, BaseGeometry
def rss():
    gc.collect()
    return psutil.Process().memory_info().rss
geometry = BaseGeometry(4, 256, 256, 128, 512, 16)
with AdapterStore(geometry, "bfloat16", 10**10) as store:
    for name in sorted(path.name for path in Path(sys.argv[1]).iterdir())[:20]:
        store.publish(store.prepare("warm-up " + name, Path(sys.argv[1]) / name))
    before, held = rss(), store.stats().resident_bytes
    infos, errors = store.load_directory(sys.argv[1], progress=False)
    assert not errors and len(infos) == 160
    print((rss() - before) / (store.stats().resident_bytes - held))
"""


def test_load_speed_and_host_memory(tmp_path):
    """160 rank-16 adapters of a small model: at most 1.3 bytes of memory per byte of tiles, and 30 seconds of processor
    time per 1,000 adapters."""
    pytest.importorskip("psutil")
    geometry = BaseGeometry(4, 256, 256, 128, 512, 16)
    template = write_peft(tmp_path / "adapters" / "a0", random_adapter(geometry, 16), dtype="bfloat16")
    content = (template / "adapter_model.safetensors").read_bytes()
    for i in range(1, 160):  # other bytes at the end of the file: other weights, another digest
        other = tmp_path / "adapters" / f"a{i}"
        other.mkdir()
        (other / "adapter_config.json").write_bytes((template / "adapter_config.json").read_bytes())
        (other / "adapter_model.safetensors").write_bytes(content[:-2] + (0x3F00 + i).to_bytes(2, "little"))
    with AdapterStore(geometry, "bfloat16", 10**10) as store:
        begin = time.process_time()
        infos, _ = store.load_directory(tmp_path / "adapters", progress=False)
        seconds = time.process_time() - begin
        assert len({info.digest for info in infos}) == 160
    assert seconds / 160 * 1000 < 30, seconds
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path / "adapters")]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{seconds / 160 * 1000:.1f} s per 1,000 adapters, {ratio:.3f} bytes of memory per byte of tiles")
    assert 0.9 < ratio < 1.3, ratio
