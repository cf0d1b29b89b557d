"""Scans of the watched directory, also during a client's load or unload, which takes precedence."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from borrowed_engine import in_event_loop

from slora_jax.serving.adapter_files import StateFile
from slora_jax.serving.adapters import STATE_FILE, Adapters
from slora_jax.serving.settings import ServerSettings


class Engine:
    """A fake of engine, store, residency and loop that keeps names only."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.engine = self.store = self.residency = self

    async def call(self, function: Callable[[Any], Any]) -> Any:
        return function(self)

    def has(self, name: str) -> bool:
        return name in self.names

    def info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, digest=name, nbytes=1)

    def is_named(self, digest: str) -> bool:
        return digest in self.names

    def holds(self, digest: str) -> bool:
        return digest in self.names

    def find(self, digest: str) -> None:
        return None

    def prepare_adapter(self, name: str, directory: Path) -> SimpleNamespace:
        return self.info(name)

    def publish_adapter(self, prepared: SimpleNamespace) -> SimpleNamespace:
        self.names.add(prepared.name)
        return prepared

    def unload_adapter(self, name: str) -> bool:
        self.names.remove(name)
        return True


def adapter(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_text("{}")
    return directory


class Paused:
    """Replaces a method by one that waits for `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
        self.has_begun, self.go = threading.Event(), threading.Event()
        original = getattr(kind, name)

        def waiting(*arguments: Any) -> Any:
            self.has_begun.set()
            assert self.go.wait(10)
            return original(*arguments)

        monkeypatch.setattr(kind, name, waiting)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.has_begun.wait, 10)


@pytest.fixture
def made(tmp_path) -> tuple[Adapters, Engine]:
    adapter(tmp_path / "watched" / "one")
    settings = ServerSettings(
        model_dir=tmp_path, adapters=tmp_path / "watched", adapter_roots=(adapter(tmp_path / "other" / "two").parent,)
    )
    return Adapters(settings, lambda name: None), Engine()


@in_event_loop
async def test_adapter_loaded_during_a_scan_stays(made, tmp_path, monkeypatch) -> None:
    adapters, engine = made
    paused = Paused(monkeypatch, StateFile, "loaded")
    load = asyncio.create_task(adapters.load(engine, "two", str(tmp_path / "other" / "two"), False))
    await paused.begun()  # registered, and not yet in the state file
    scan = asyncio.create_task(adapters.scan(engine))
    await asyncio.sleep(0.2)
    paused.go.set()
    await asyncio.gather(load, scan)
    assert engine.has("two")
    for _ in range(3):
        await adapters.scan(engine)
        assert engine.has("two")
    assert engine.names == {"one", "two"}


@in_event_loop
async def test_adapter_unloaded_during_a_scan_stays_unloaded(made, monkeypatch) -> None:
    adapters, engine = made
    for _ in range(2):
        await adapters.scan(engine)
    assert engine.names == {"one"}
    paused = Paused(monkeypatch, StateFile, "unloaded")
    unload = asyncio.create_task(adapters.unload(engine, "one", 1.0))
    await paused.begun()  # unregistered, and not yet in the state file
    scan = asyncio.create_task(adapters.scan(engine))
    await asyncio.sleep(0.2)
    paused.go.set()
    await asyncio.gather(unload, scan)
    assert engine.names == set()
    for _ in range(3):
        await adapters.scan(engine)
        assert engine.names == set()


@in_event_loop
async def test_unloaded_adapter_is_served_again_when_its_files_are_replaced(made, tmp_path) -> None:
    adapters, engine = made
    folder = tmp_path / "watched" / "one"

    async def scan_twice() -> dict[str, str]:
        for _ in range(2):
            await adapters.scan(engine)
        return adapters.refused

    assert await scan_twice() == {} and engine.names == {"one"}
    await adapters.unload(engine, "one", 1.0)
    adapters = Adapters(adapters._settings, lambda name: None)  # after a restart
    assert "a client unloaded it" in (await scan_twice())["one"] and engine.names == set()
    (folder / "adapter_model.safetensors").write_text("{ }")
    assert await scan_twice() == {} and engine.names == {"one"}

    await adapters.unload(engine, "one", 1.0)
    folder.rename(tmp_path / "elsewhere")
    assert await scan_twice() == {}
    adapter(folder)
    assert await scan_twice() == {} and engine.names == {"one"}


@in_event_loop
async def test_state_file_of_an_earlier_version_is_read(made, tmp_path) -> None:
    adapters, engine = made
    (tmp_path / "watched" / STATE_FILE).write_text(json.dumps({"loaded": {}, "unloaded": ["one"]}))
    for _ in range(2):
        await adapters.scan(engine)
    assert "a client unloaded it" in adapters.refused["one"] and engine.names == set()
    await adapters.load(engine, "one", "one", False)
    await adapters.scan(engine)
    assert adapters.refused == {} and engine.names == {"one"}


@in_event_loop
async def test_folders_left_out_are_listed_with_the_reason(made, tmp_path, caplog) -> None:
    adapters, engine = made
    watched = tmp_path / "watched"
    adapter(watched / adapters._settings.base_name)
    adapter(watched / "group" / "inner")
    adapter(watched / "a\nb")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (watched / file).write_text("{}")
    (watched / "notes").mkdir()
    reasons = {
        adapters._settings.base_name: "base model's name",
        "group": "holds adapters ('inner')",
        "'a\\nb'": "do not print",
        "watched": "is an adapter itself",
    }
    for _ in range(3):
        await adapters.scan(engine)
    assert engine.names == {"one"}
    assert adapters.refused.keys() == reasons.keys() and len(caplog.messages) >= len(reasons)
    for name, reason in reasons.items():
        assert reason in adapters.refused[name]
        assert sum(reason in message for message in caplog.messages) == 1


@in_event_loop
async def test_removed_folder_is_unregistered_after_two_scans(made, tmp_path) -> None:
    adapters, engine = made
    for _ in range(3):
        await adapters.scan(engine)
    assert engine.names == {"one"}
    (tmp_path / "watched" / "one").rename(tmp_path / "elsewhere")
    await adapters.scan(engine)
    assert engine.names == {"one"}
    await adapters.scan(engine)
    assert engine.names == set()
