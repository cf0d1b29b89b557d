"""A look at the watched directory that meets a client's load or unload half-way: the client's word counts."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slora_jax.serving.adapters import STATE_FILE, Adapters, StateFile
from slora_jax.serving.settings import ServerSettings


class Engine:
    """Keeps names only; it is its own store and residency, and the loop that it is called by."""

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
    """A method that waits before it does its work, until it is let go."""

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


def test_what_a_client_loads_during_a_look_stays(made, tmp_path, monkeypatch):
    adapters, engine = made

    async def play() -> None:
        paused = Paused(monkeypatch, StateFile, "loaded")
        load = asyncio.create_task(adapters.load(engine, "two", str(tmp_path / "other" / "two"), False))
        await paused.begun()  # it is registered, and the state file does not know it yet
        look = asyncio.create_task(adapters.look(engine))
        await asyncio.sleep(0.2)
        paused.go.set()
        await asyncio.gather(load, look)
        assert engine.has("two")
        for _ in range(3):
            await adapters.look(engine)
            assert engine.has("two")
        assert engine.names == {"one", "two"}

    asyncio.run(play())


def test_what_a_client_unloads_during_a_look_does_not_come_back(made, monkeypatch):
    adapters, engine = made

    async def play() -> None:
        for _ in range(2):
            await adapters.look(engine)
        assert engine.names == {"one"}
        paused = Paused(monkeypatch, StateFile, "unloaded")
        unload = asyncio.create_task(adapters.unload(engine, "one", 1.0))
        await paused.begun()  # its name is gone, and the state file does not know it yet
        look = asyncio.create_task(adapters.look(engine))
        await asyncio.sleep(0.2)
        paused.go.set()
        await asyncio.gather(unload, look)
        assert engine.names == set()
        for _ in range(3):
            await adapters.look(engine)
            assert engine.names == set()

    asyncio.run(play())


def test_an_adapter_that_a_client_unloaded_is_served_again_when_its_files_are_replaced(made, tmp_path):
    adapters, engine = made
    folder = tmp_path / "watched" / "one"

    async def look() -> dict[str, str]:
        for _ in range(2):
            await adapters.look(engine)
        return adapters.refused

    async def play() -> None:
        nonlocal adapters
        assert await look() == {} and engine.names == {"one"}
        await adapters.unload(engine, "one", 1.0)
        adapters = Adapters(adapters._settings, lambda name: None)  # after a restart
        assert "a client unloaded it" in (await look())["one"] and engine.names == set()
        (folder / "adapter_model.safetensors").write_text("{ }")
        assert await look() == {} and engine.names == {"one"}

        await adapters.unload(engine, "one", 1.0)
        folder.rename(tmp_path / "elsewhere")
        assert await look() == {}
        adapter(folder)
        assert await look() == {} and engine.names == {"one"}

    asyncio.run(play())


def test_names_that_an_earlier_version_unloaded_stay_unloaded(made, tmp_path):
    adapters, engine = made
    (tmp_path / "watched" / STATE_FILE).write_text(json.dumps({"loaded": {}, "unloaded": ["one"]}))

    async def play() -> None:
        for _ in range(2):
            await adapters.look(engine)
        assert "a client unloaded it" in adapters.refused["one"] and engine.names == set()
        await adapters.load(engine, "one", "one", False)
        await adapters.look(engine)
        assert adapters.refused == {} and engine.names == {"one"}

    asyncio.run(play())


def test_folders_that_are_not_served_are_listed_with_the_reason(made, tmp_path, caplog):
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

    async def play() -> None:
        for _ in range(3):
            await adapters.look(engine)
        assert engine.names == {"one"}

    asyncio.run(play())
    assert adapters.refused.keys() == reasons.keys() and len(caplog.messages) >= len(reasons)
    for name, reason in reasons.items():
        assert reason in adapters.refused[name]
        assert sum(reason in message for message in caplog.messages) == 1


def test_what_leaves_the_directory_goes_after_two_looks(made, tmp_path):
    adapters, engine = made

    async def play() -> None:
        for _ in range(3):
            await adapters.look(engine)
        assert engine.names == {"one"}
        (tmp_path / "watched" / "one").rename(tmp_path / "elsewhere")
        await adapters.look(engine)
        assert engine.names == {"one"}
        await adapters.look(engine)
        assert engine.names == set()

    asyncio.run(play())
