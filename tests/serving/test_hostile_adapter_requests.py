"""Adapters with hostile names, paths and files are refused with the right status and harm nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from live_server import MANAGE_KEY, SERVE_KEY, until, write_adapter
from tiny_model import TinyModel
from unharmed import GOOD, good_tokens, refused
from wire import exchange, head, post

COMPLETIONS = "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

pytestmark = pytest.mark.usefixtures("unharmed", "still_answers")


PATHS = {
    403: [
        *("/etc", "/", "../..", "../model", "adapter-0/../../model", "x/../../model", "/proc/self/root/etc"),
        *("inside", "UPLOADS/escape", "UPLOADS/inside", "UPLOADS/whole"),
    ],
    404: [
        *("~", "~root/.ssh", "$HOME", "file:///etc", "\\..\\..", "a/" * 2000, "adapter-0/adapter_config.json"),
        *("unknown", "..%2f..%2fmodel", "escape", "loop"),
    ],
    400: ["a\x00b", "x" * 4000, "x" * 5000, "\ud800"],
}


@pytest.mark.parametrize("status", PATHS)
def test_path_out_of_the_roots_is_403_and_a_missing_one_404(server, files, tiny, tmp_path, status) -> None:
    secret = write_adapter(tmp_path / "secret", tiny, seed=105)
    links = {"escape": files.model, "loop": files.uploads / "loop", "whole": secret}
    links |= {f"inside/{file.name}": file for file in secret.iterdir()}
    (files.uploads / "inside").mkdir()
    for name, target in links.items():
        (files.uploads / name).symlink_to(target)
    try:
        for path in PATHS[status]:
            body = {"lora_name": "evil", "lora_path": path.replace("UPLOADS", str(files.uploads))}
            message = refused(server, post(LOAD, body, MANAGE_KEY), status)
            assert status != 403 or str(files.model) not in message
    finally:
        for name in links:
            (files.uploads / name).unlink()
        (files.uploads / "inside").rmdir()


def spoil(directory: Path, kind: str) -> None:
    """Damages an adapter."""
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    match kind:
        case "fifo" | "config fifo":
            target = weights if kind == "fifo" else config
            target.unlink()
            os.mkfifo(target)
        case "pickle":
            weights.unlink()
            (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
        case "huge header":
            weights.write_bytes((2**62).to_bytes(8, "little") + b"{}")
        case "huge shape":
            header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
            weights.write_bytes(len(header).to_bytes(8, "little") + header)
        case "huge rank":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 2**40}))
        case "deep config":
            config.write_text("[" * 100_000)
        case "regex":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": "(a+)+$" * 20}))
        case "empty":
            weights.write_bytes(b"")
        case "binary config":
            config.write_bytes(b"\xff\xfe\x00" * 1000)


@pytest.mark.parametrize(
    "kind",
    [
        *("fifo", "config fifo", "pickle", "huge header", "huge shape", "huge rank", "deep config", "regex", "empty"),
        "binary config",
    ],
)
def test_hostile_adapter_is_400_without_memory_growth(server, files, tiny, kind) -> None:
    directory = write_adapter(files.uploads / "hostile", tiny, seed=50)
    spoil(directory, kind)
    memory = server.psutil().memory_info().rss
    try:
        body = {"lora_name": "hostile", "lora_path": str(directory)}
        message = refused(server, post(LOAD, body, MANAGE_KEY), 400)
        assert str(files.uploads) not in message or len(message) < 1000
        assert server.psutil().memory_info().rss - memory < 64 << 20
        assert exchange(server, head("GET", "/v1/models/hostile", SERVE_KEY) + b"\r\n").status == 404
        assert not Path("/tmp/pwned").exists()
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def test_unprintable_and_taken_names_are_refused(server, files) -> None:
    names = ["", "base", "a\nb", "a\x00b", "\x1b[2J", "\u202egpj", "\u200b", "\ud800", "x" * 257, "x" * 10_000, "a\tb"]
    for name in names:
        body = {"lora_name": name, "lora_path": str(files.adapters / "adapter-0")}
        refused(server, post(LOAD, body, MANAGE_KEY), 400)


def test_odd_names_are_keys_and_never_paths(server, files) -> None:
    for name in ("../../etc/passwd", "/", ".", "..", "b\u0430se", "adapter-0 ", "\u00e9" * 256, "a/b?c#d", "{x}"):
        body = {"lora_name": name, "lora_path": str(files.adapters / "adapter-1")}
        loaded = exchange(server, post(LOAD, body, MANAGE_KEY))
        assert loaded.status == 200 and loaded.json["name"] == name
        asked = post(COMPLETIONS, GOOD | {"model": name}, SERVE_KEY)
        assert exchange(server, asked).json["choices"][0]["token_ids"] == good_tokens(server)
        assert exchange(server, post(UNLOAD, {"lora_name": name}, MANAGE_KEY)).status == 200
        assert exchange(server, asked).status == 404


def test_folder_whose_name_is_not_utf8_is_refused_and_listed(server, files, tiny: TinyModel) -> None:
    directory = Path(os.fsdecode(bytes(files.adapters) + b"/evil-\xff\n"))
    write_adapter(files.adapters / ".made", tiny, seed=51).rename(directory)
    try:
        until(lambda: b"evil" in server.get("/v1/adapters", SERVE_KEY)[1], "the folder was found")
        for path in ("/v1/models", "/v1/adapters", "/metrics", "/state"):
            assert server.get(path, SERVE_KEY)[0] == 200
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
