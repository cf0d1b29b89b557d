"""Adapters named, placed and made to hurt the server: refused with the right status, and nobody is harmed."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from live_server import MANAGE_KEY, SERVE_KEY, write_adapter
from tiny_model import TinyModel
from unharmed import good_tokens, refused
from wire import exchange, head, post

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
OK = {"prompt": "x", "max_tokens": 2}

pytestmark = pytest.mark.usefixtures("unharmed", "still_answers")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/etc", 403),
        ("/", 403),
        ("../..", 403),
        ("../model", 403),
        ("adapter-0/../../model", 403),
        ("~", 404),
        ("~root/.ssh", 404),
        ("$HOME", 404),
        ("file:///etc", 404),
        ("a\x00b", 400),
        ("/proc/self/root/etc", 403),
        ("\\..\\..", 404),
        ("x" * 4000, 400),
        ("x" * 5000, 400),
        ("a/" * 2000, 404),
        ("adapter-0/adapter_config.json", 404),
        ("\ud800", 400),
        ("nobody", 404),
        ("..%2f..%2fmodel", 404),
        ("escape", 404),
        ("inside", 403),
        ("loop", 404),
        ("UPLOADS/escape", 403),
        ("UPLOADS/inside", 403),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_path_that_leads_out_is_403_and_one_to_nothing_404(server, files, path, status) -> None:
    (files.uploads / "escape").symlink_to(files.model)
    (files.uploads / "loop").symlink_to(files.uploads / "loop")
    inside = files.uploads / "inside"
    inside.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (inside / file).symlink_to(files.model / "config.json")
    try:
        body = {"lora_name": "evil", "lora_path": path.replace("UPLOADS", str(files.uploads))}
        message = refused(server, post(LOAD, body, MANAGE_KEY), status)
        assert status != 403 or str(files.model) not in message
    finally:
        for file in ("escape", "loop", *(f"inside/{one.name}" for one in inside.iterdir())):
            (files.uploads / file).unlink()
        inside.rmdir()


def spoil(directory: Path, kind: str) -> None:
    """Makes of a sound adapter one that hurts."""
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
def test_a_hostile_adapter_is_400_and_costs_nothing(server, files, tiny, kind) -> None:
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


@pytest.mark.parametrize(
    "name",
    ["", "base", "a\nb", "a\x00b", "\x1b[2J", "\u202egpj", "\u200b", "\ud800", "x" * 257, "x" * 10_000, "a\tb"],
    ids=lambda name: repr(name)[:20],
)
def test_names_that_cannot_be_shown_or_are_taken_are_refused(server, files, name) -> None:
    body = {"lora_name": name, "lora_path": str(files.adapters / "adapter-0")}
    refused(server, post(LOAD, body, MANAGE_KEY), 400)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/", ".", "..", "b\u0430se", "adapter-0 ", "\u00e9" * 256, "%2e%2e", "a/b?c#d", "{x}"]
)
def test_odd_names_are_names_like_others(server, files, name) -> None:
    """A name is a key, never a path."""
    body = {"lora_name": name, "lora_path": str(files.adapters / "adapter-1")}
    loaded = exchange(server, post(LOAD, body, MANAGE_KEY))
    assert loaded.status == 200 and loaded.json["name"] == name
    asked = post(COMPLETIONS, {"model": name, "prompt": "List all users", "max_tokens": 8, "temperature": 0,
                               "return_token_ids": True}, SERVE_KEY)  # fmt: skip
    assert exchange(server, asked).json["choices"][0]["token_ids"] == good_tokens(server)
    unloaded = exchange(server, post(UNLOAD, {"lora_name": name}, MANAGE_KEY))
    assert unloaded.status == 200, unloaded
    assert exchange(server, asked).status == 404


def test_adapters_loaded_and_unloaded_at_once_under_one_name(server, files) -> None:
    """Each is told something that is true, and at the end the name is free."""
    statuses = []

    def send(path: str, body: dict) -> None:
        statuses.append(exchange(server, post(path, body, MANAGE_KEY)).status)

    body = {"lora_name": "twice", "lora_path": str(files.adapters / "adapter-2")}
    threads = [
        threading.Thread(target=send, args=((LOAD, body) if i % 2 else (UNLOAD, {"lora_name": "twice"})))
        for i in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 400, 404} and len(statuses) == 24
    exchange(server, post(UNLOAD, {"lora_name": "twice"}, MANAGE_KEY))
    assert exchange(server, head("GET", "/v1/models/twice", SERVE_KEY) + b"\r\n").status == 404


def test_a_directory_whose_name_is_no_text_disturbs_no_list(server, files, tiny: TinyModel) -> None:
    directory = Path(os.fsdecode(bytes(files.adapters) + b"/evil-\xff\n"))
    write_adapter(files.adapters / ".made", tiny, seed=51).rename(directory)
    try:
        time.sleep(0.6)  # the server looks every 0.1 s, and registers what it has seen twice
        for path in ("/v1/models", "/v1/adapters", "/metrics", "/state"):
            assert server.get(path, SERVE_KEY)[0] == 200
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
