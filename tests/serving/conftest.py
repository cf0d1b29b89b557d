"""One server with keys for all tests of its API, and the engine that it must equal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import ADAPTERS, MANAGE_KEY, SERVE_KEY, Files, LiveServer, engine_config, write_adapter
from tiny_model import TinyModel

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
