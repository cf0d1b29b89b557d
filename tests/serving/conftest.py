"""One server with keys for all tests of its API, and the engine that it must equal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import ADAPTERS, MANAGE_KEY, SERVE_KEY, Files, LiveServer, engine_config, write_adapter
from tiny_model import TinyModel
from unharmed import MEMORY, Before

from slora_jax import Engine


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
    for i in range(ADAPTERS):
        write_adapter(made.adapters / f"adapter-{i}", tiny, seed=i, rank=(4, 8, 16)[i % 3])
    return made


@pytest.fixture(scope="session")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Shared: a test leaves its adapters as it found them, and nothing running."""
    config = {
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
def reference(files: Files) -> Iterator[Engine]:
    """An engine of the server's settings, driven directly."""
    with Engine.from_pretrained(files.model, engine_config()) as engine:
        engine.load_adapters(files.adapters)
        yield engine


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    """For loops and services in the test's own process; afterwards nothing is under way and no page is lost."""
    with Engine(tiny.config, tiny.graphdef, tiny.params, engine_config()) as engine:
        yield engine
        engine.check()
        stats = engine.stats()
        assert stats.pages.kv == 0 and stats.running == stats.waiting == 0


@pytest.fixture(scope="module")
def unharmed(server: LiveServer) -> Iterator[Before]:
    """The server before hostile requests; after them it is as it was."""
    before = Before.of(server)
    yield before
    before.check_all(server, MEMORY)


@pytest.fixture
def still_answers(server: LiveServer, unharmed: Before) -> Iterator[None]:
    """After each hostile request a good one is answered as before."""
    yield
    unharmed.check_answers(server)
