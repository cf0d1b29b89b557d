"""Adapters that clients load and unload, and adapters found in the watched directory, while the server runs."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import MANAGE_KEY, SERVE_KEY, Files, LiveServer, until, write_adapter
from safetensors.numpy import load_file, save_file
from wire import exchange, post

PROMPT = {"prompt": "List all users", "max_tokens": 12, "temperature": 0}


@pytest.fixture(autouse=True)
def as_found(server: LiveServer, files: Files) -> Iterator[None]:
    before = set(names(server))
    yield
    for name in set(names(server)) - before:
        server.post("/v1/unload_lora_adapter", {"lora_name": name}, MANAGE_KEY)
    for directory in files.uploads.iterdir():
        shutil.rmtree(directory)
    assert set(names(server)) == before


def adapters(server: LiveServer) -> dict[str, dict[str, Any]]:
    status, body = server.get("/v1/adapters", SERVE_KEY)
    assert status == 200
    return {entry["name"]: entry for entry in json.loads(body)["data"]}


def names(server: LiveServer) -> list[str]:
    return list(adapters(server))


def load(server: LiveServer, name: str, path: Path | str, **more: Any) -> tuple[int, Any]:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more}, MANAGE_KEY)


def unload(server: LiveServer, name: str, **more: Any) -> tuple[int, Any]:
    return server.post("/v1/unload_lora_adapter", {"lora_name": name, **more}, MANAGE_KEY)


def text(server: LiveServer, model: str, **more: Any) -> str:
    status, answer = server.post("/v1/completions", {"model": model, **PROMPT, **more}, SERVE_KEY)
    assert status == 200, answer
    return answer["choices"][0]["text"]


def test_adapter_is_loaded_used_listed_and_unloaded(server, files, tiny) -> None:
    write_adapter(files.uploads / "fresh", tiny, seed=100, rank=16)
    status, answer = load(server, "tenant/fresh", "fresh")  # relative to a root
    assert status == 200 and answer["rank"] == 16 and "added successfully" in answer["message"]
    assert adapters(server)["tenant/fresh"]["state"] == "host"
    assert text(server, "tenant/fresh") != text(server, "base")

    entry = adapters(server)["tenant/fresh"]
    assert entry["state"] == "device" and entry["requests"] == 1 and entry["generated_tokens"] <= 12
    assert entry["digest"] == answer["digest"] and entry["bytes"] == answer["bytes"] > 0
    assert abs(entry["last_used"] - time.time()) < 60 and entry["queue_seconds_mean"] >= 0

    status, answer = unload(server, "tenant/fresh")
    assert status == 200 and answer["freed"] and answer["freed_pages"] == entry["pages"]
    assert answer["freed_bytes"] == entry["bytes"]
    status, answer = server.post("/v1/completions", {"model": "tenant/fresh", **PROMPT}, SERVE_KEY)
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert unload(server, "tenant/fresh")[0] == 404


def test_name_is_replaced_only_in_place(server, files, tiny) -> None:
    write_adapter(files.uploads / "one", tiny, seed=102)
    write_adapter(files.uploads / "two", tiny, seed=103)
    assert load(server, "swap", files.uploads / "one")[0] == 200
    first = text(server, "swap")
    status, answer = load(server, "swap", files.uploads / "two")
    assert status == 400 and "load_inplace" in answer["error"]["message"]
    assert text(server, "swap") == first
    assert load(server, "swap", files.uploads / "two", load_inplace=True)[0] == 200
    assert text(server, "swap") != first
    assert load(server, "base", files.uploads / "two")[0] == 400


def test_invalid_adapter_changes_nothing(server, files, tiny) -> None:
    directory = write_adapter(files.uploads / "bad", tiny, seed=104)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    status, answer = load(server, "bad", directory)
    assert status == 400 and "use_qalora" in answer["error"]["message"] and answer["error"]["code"] == "invalid_adapter"
    assert "bad" not in names(server)
    assert load(server, "bad", files.uploads / "nowhere")[0] == 404


def test_non_finite_logits_fail_the_request(server, files, tiny) -> None:
    directory = write_adapter(files.uploads / "huge", tiny, seed=105)
    weights = load_file(directory / "adapter_model.safetensors")
    huge = {name: tensor * np.float32(1e30 if "lora_B" in name else 1) for name, tensor in weights.items()}
    save_file(huge, directory / "adapter_model.safetensors")
    assert load(server, "huge", directory)[0] == 200
    expected = text(server, "base")
    for more in ({}, {"temperature": 0.8}, {"logprobs": 2}):
        body = {"model": "huge", **PROMPT, **more}
        status, answer = server.post("/v1/completions", body, SERVE_KEY)
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert answer["error"]["message"].startswith("adapter 'huge': the logits of output token 0 are not finite")
    stream = exchange(server, post("/v1/completions", body | {"stream": True}, SERVE_KEY))
    assert stream.status == 500 and stream.json == answer, "errors before the first token are statuses"
    assert text(server, "base") == expected


def test_unload_waits_for_the_requests_that_use_it(server, files, tiny) -> None:
    write_adapter(files.uploads / "busy", tiny, seed=106)
    load(server, "busy", files.uploads / "busy")
    expected = text(server, "busy", max_tokens=60, ignore_eos=True)
    answers: list[str] = []

    def ask() -> None:
        answers.append(text(server, "busy", max_tokens=60, ignore_eos=True))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: adapters(server)["busy"]["state"] == "pinned" or len(answers) == 8)
    status, answer = unload(server, "busy")
    assert status == 200 and answer["freed"], answer
    for thread in threads:
        thread.join()
    assert answers == [expected] * 8


def test_watched_directory_is_followed(server, files, tiny) -> None:
    ready = write_adapter(files.uploads / "later", tiny, seed=107)
    directory = files.adapters / "later"
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes((ready / "adapter_config.json").read_bytes())
    until(lambda: "later" in refused(server))  # it is incomplete
    assert "later" not in names(server)
    (directory / "adapter_model.safetensors").write_bytes((ready / "adapter_model.safetensors").read_bytes())
    until(lambda: "later" in names(server))
    assert "later" not in refused(server)
    first = text(server, "later")

    write_adapter(directory, tiny, seed=108)  # other weights
    until(lambda: text(server, "later") != first)
    assert unload(server, "later")[0] == 200
    until(lambda: "a client unloaded it" in refused(server).get("later", ""))  # by a later scan
    assert "later" not in names(server)
    assert load(server, "later", directory)[0] == 200
    shutil.rmtree(directory)
    until(lambda: "later" not in names(server))


def test_unload_keeps_content_that_another_name_shares(server, files, tiny) -> None:
    write_adapter(files.uploads / "shared", tiny, seed=109)
    load(server, "left", files.uploads / "shared")
    load(server, "right", files.uploads / "shared")
    expected = text(server, "left")
    status, answer = unload(server, "left")
    assert status == 200 and not answer["freed"] and "another name" in answer["message"]
    assert text(server, "right") == expected
    assert unload(server, "right")[1]["freed"]


def test_concurrent_loads_and_unloads_of_one_name_leave_it_usable(server, files, tiny) -> None:
    for i in range(4):
        write_adapter(files.uploads / f"v{i}", tiny, seed=110 + i)
    statuses: list[int] = []

    def storm(i: int) -> None:
        for _ in range(3):
            statuses.append(load(server, "stormy", files.uploads / f"v{i}", load_inplace=True)[0])
            statuses.append(unload(server, "stormy")[0])

    threads = [threading.Thread(target=storm, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 404} and statuses.count(200) > 12
    status, _ = load(server, "stormy", files.uploads / "v0", load_inplace=True)
    assert status == 200 and text(server, "stormy")


def refused(server: LiveServer) -> dict[str, str]:
    return json.loads(server.get("/v1/adapters", SERVE_KEY)[1])["refused"]
