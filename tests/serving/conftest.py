"""One server with keys for all tests of its API, and one engine of the same settings in the tests' process."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from live_server import (
    ADAPTERS,
    ENGINE,
    MANAGE_KEY,
    RESPONSE_TEMPLATE,
    SERVE_KEY,
    Files,
    LiveServer,
    engine_config,
    write_adapter,
)
from tiny_model import TinyModel
from unharmed import MEMORY, Before

from slora_jax import Engine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps tests of one server, and tests of one recorded run, in one process of xdist (`--dist loadgroup`)."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent.name == "serving":
            if "server" in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group("server"))
            elif hasattr(item.module, "recording"):
                item.add_marker(pytest.mark.xdist_group("recording"))
            elif "engine" in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group("serving engine"))


@pytest.fixture(scope="session")
def tiny() -> TinyModel:
    return TinyModel()


@pytest.fixture(scope="session")
def files(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("serving")
    made = Files(root / "model", root / "adapters", root / "uploads")
    made.model.mkdir()
    made.uploads.mkdir()
    tiny.save(made.model)
    config = made.model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"response_template": RESPONSE_TEMPLATE}))
    for i in range(ADAPTERS):
        write_adapter(made.adapters / f"adapter-{i}", tiny, seed=i, rank=(4, 8, 16)[i % 3])
    return made


@pytest.fixture(scope="session")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The shared server. A test restores its adapters and leaves nothing running."""
    config = {
        "engine": ENGINE | {"embeddings": True},
        "adapters": str(files.adapters),
        "adapter_roots": [str(files.uploads)],
        "state_file": str(tmp_path_factory.mktemp("state") / "adapters.json"),
        "watch_seconds": 0.1,
        "limits": {"body_bytes": 1 << 20, "header_seconds": 2, "body_seconds": 2, "write_seconds": 2},
        "api_keys": [
            {"name": "serving", "key": SERVE_KEY},
            {"name": "managing", "key": MANAGE_KEY, "rights": ["serve", "manage"]},
        ],
    }
    with LiveServer(files.model, tmp_path_factory.mktemp("server") / "server.yaml", config) as server:
        yield server
        assert server.process.poll() is None, server.log


@pytest.fixture(scope="session")
def engine(files: Files) -> Iterator[Engine]:
    """An engine of the server's settings, for direct use and for loops. At the end nothing is running or leaked."""
    with Engine.from_pretrained(files.model, engine_config()) as engine:
        engine.load_adapters(files.adapters)
        yield engine
        engine.check()
        stats = engine.stats()
        assert stats.pages.kv == 0 and stats.running == stats.waiting == 0


@pytest.fixture(scope="module")
def unharmed(server: LiveServer) -> Iterator[Before]:
    """The server's state before a module's hostile requests; checked again after them."""
    before = Before.of(server)
    yield before
    before.check_all(server, MEMORY)


@pytest.fixture
def still_answers(server: LiveServer, unharmed: Before) -> Iterator[None]:
    """Checks after each test that an ordinary request is answered as before."""
    yield
    unharmed.check_answers(server)
