"""The host store beyond its memory budget: LRU spill, reads in the background, failures, many threads."""

import errno
import json
import logging
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
from store_content import eventually, load, same

from slora_jax.adapters import AdapterStore, pack_tiles, write_peft
from slora_jax.errors import AdapterError, ConfigError

TIMEOUT = 20.0  # seconds; only a failing test waits that long


def spill_files(tmp_path):
    return sorted((tmp_path / "spill").rglob("*.tiles"))


def resident(store, adapters):
    tiers = store.tiers()
    return [i for i, adapter in enumerate(adapters) if tiers[adapter.digest] == "host"]


# Spill


def test_least_recently_used_is_spilled(open_store, adapters, size, tmp_path):
    store = open_store(3 * size)
    for i in range(3):
        load(store, str(i), adapters[i])
    store.request(adapters[0].digest)  # 1 is now the oldest
    load(store, "3", adapters[3])
    assert resident(store, adapters[:4]) == [0, 2, 3]
    stats = store.stats()
    assert (stats.registered, stats.resident_bytes, stats.spilled, stats.spill_writes) == (4, 3 * size, 1, 1)
    assert [path.stat().st_size for path in spill_files(tmp_path)] == [size]


def test_acquired_content_is_spilled_last(open_store, adapters, size):
    store = open_store(2 * size)
    for i in range(2):
        store.acquire(load(store, str(i), adapters[i]).digest)
    load(store, "2", adapters[2])
    assert resident(store, adapters[:3]) == [1, 2]  # all others acquired: the oldest of them is spilled
    load(store, "3", adapters[3])
    assert resident(store, adapters[:4]) == [1, 3]  # 2 is younger than 1, but not acquired


def test_spilled_adapter_comes_back_identical(open_store, adapters, geometry, size):
    store = open_store(2 * size)
    for i, adapter in enumerate(adapters):
        load(store, str(i), adapter)
    for adapter in adapters:
        assert same(store.wait(adapter.digest, TIMEOUT), adapter, geometry)
    assert eventually(lambda: store.stats().resident_bytes <= 2 * size)
    stats = store.stats()
    assert stats.spilled == 6
    assert stats.spill_reads == 8 and stats.spill_writes == 8  # content never changes, so it is written once


def test_request_returns_at_once_and_reads_in_the_background(open_store, adapters, geometry, size):
    store = open_store(size)
    load(store, "0", adapters[0])
    load(store, "1", adapters[1])
    gate, read = threading.Event(), store._files.read
    store._files.read = lambda spilled: gate.wait(TIMEOUT) and read(spilled)  # a slow disk
    begin = time.monotonic()
    assert store.request(adapters[0].digest) is None
    assert store.request(adapters[0].digest) is None and store.request(adapters[1].digest) is not None
    with pytest.raises(AdapterError, match=r"was not read back within 0\.05 s"):
        store.wait(adapters[0].digest, 0.05)
    assert time.monotonic() - begin < TIMEOUT / 2
    gate.set()
    assert same(store.wait(adapters[0].digest, TIMEOUT), adapters[0], geometry)
    assert store.stats().spill_reads == 1
    assert store.request(adapters[0].digest) is not None


def test_content_just_read_is_not_evicted_next(open_store, adapters, size):
    store = open_store(2 * size)
    for i in range(3):
        store.acquire(load(store, str(i), adapters[i]).digest)
    store.release(adapters[0].digest)
    store.wait(adapters[0].digest, TIMEOUT)
    assert eventually(lambda: store.stats().resident_bytes <= 2 * size)
    assert resident(store, adapters[:3]) == [0, 2]


def test_removing_content_removes_its_spill_file(open_store, adapters, size, tmp_path):
    store = open_store(size)
    load(store, "0", adapters[0])
    load(store, "1", adapters[1])
    assert len(spill_files(tmp_path)) == 1
    store.remove("0")
    assert eventually(lambda: spill_files(tmp_path) == [])
    assert store.stats().spilled == 0


def test_budget_smaller_than_one_adapter_is_refused(open_store, adapters, size):
    store = open_store(size - 1)
    with pytest.raises(AdapterError, match=rf"'x' needs {size} bytes but host_adapter_bytes is {size - 1}"):
        load(store, "x", adapters[0])
    assert store.stats().registered == 0 and store.stats().resident_bytes == 0


def test_close_ends_the_worker_and_removes_the_spill_files(open_store, adapters, size, tmp_path):
    store = open_store(size)
    for i in range(3):
        load(store, str(i), adapters[i])
    store.wait(adapters[0].digest, TIMEOUT)
    worker = store._worker
    store.close()
    store.close()
    assert not worker.is_alive() and list((tmp_path / "spill").iterdir()) == []
    with pytest.raises(AdapterError, match="closed"):
        store.request(adapters[0].digest)
    with pytest.raises(AdapterError, match="closed"):
        load(store, "x", adapters[0])


def test_closing_releases_a_blocked_caller(open_store, adapters, size):
    store = open_store(size)
    load(store, "0", adapters[0])
    load(store, "1", adapters[1])
    started, release, read = threading.Event(), threading.Event(), store._files.read
    store._files.read = lambda spilled: (started.set(), release.wait(TIMEOUT), read(spilled))[2]
    errors = []

    def wait():
        try:
            store.wait(adapters[0].digest)
        except AdapterError as error:
            errors.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert started.wait(TIMEOUT)
    threading.Timer(0.05, release.set).start()
    store.close()
    waiter.join(TIMEOUT)
    assert len(errors) == 1 and "removed while it was awaited" in errors[0]


# Failures


def test_spill_directory_that_cannot_be_made_is_refused_at_once(geometry, tmp_path):
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"spill_dir='.*/file.*': must be a directory that can be written: "):
            AdapterStore(geometry, "float32", 10**9, parent)


def test_failed_write_leaves_no_file(open_store, adapters, size, tmp_path, monkeypatch):
    store = open_store(size)

    def no_replace(source, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("slora_jax.adapters.spill.os.replace", no_replace)
    load(store, "0", adapters[0])
    load(store, "1", adapters[1])
    assert [path for path in (tmp_path / "spill").rglob("*") if path.is_file()] == []


# Lost spill files


def delete(path, other):
    path.unlink()


def truncate(path, other):
    os.truncate(path, path.stat().st_size - 1)


def flip_one_bit(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_another_adapters_file(path, other):
    shutil.copyfile(other, path)


def make_unreadable(path, other):
    path.unlink()
    path.symlink_to(path)  # too many levels of symbolic links, also for root


DAMAGES = [delete, truncate, flip_one_bit, replace_by_another_adapters_file, make_unreadable]


@pytest.fixture
def damaged(open_store, adapters, size, tmp_path):
    """`damaged(damage, source)`: a store with adapters "0" to "2", of which "2" is in memory and the spill file of "0"
    is damaged. "0" was read from the directory `source`, or came from memory."""

    def make(damage, source=None):
        store = open_store(size)
        load(store, "0", adapters[0] if source is None else write_peft(source, adapters[0]))
        for i in (1, 2):
            load(store, str(i), adapters[i])
        files = {path.name[:16]: path for path in spill_files(tmp_path)}
        damage(*(files[adapter.digest[:16]] for adapter in adapters[:2]))
        return store

    return make


@pytest.mark.parametrize("damage", DAMAGES)
def test_lost_spill_file_is_an_error_of_that_adapter_only(damaged, adapters, geometry, tmp_path, damage):
    store = damaged(damage)
    with pytest.raises(
        AdapterError, match=r"was lost: .*spill file (is (damaged|missing)|cannot be read).* from memory"
    ):
        store.wait(adapters[0].digest, TIMEOUT)
    for method in (store.request, store.wait):  # the error is kept
        with pytest.raises(AdapterError, match=r"was lost.*load the adapter again"):
            method(adapters[0].digest)
    assert same(store.wait(adapters[1].digest, TIMEOUT), adapters[1], geometry)
    load(store, "0", adapters[0])  # the same content again
    assert same(store.wait(adapters[0].digest, TIMEOUT), adapters[0], geometry)
    for name in ("0", "1", "2"):
        store.remove(name)
    assert store.stats().resident_bytes == 0 and store.stats().spilled == 0
    assert eventually(lambda: spill_files(tmp_path) == [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_lost_spill_file_is_replaced_from_an_unchanged_source(damaged, adapters, geometry, tmp_path, caplog, damage):
    store = damaged(damage, tmp_path / "source")
    with caplog.at_level(logging.WARNING):
        assert same(store.wait(adapters[0].digest, TIMEOUT), adapters[0], geometry)
    assert f"{tmp_path / 'source'} was read again" in caplog.text and adapters[0].digest[:12] in caplog.text


def remove(source, other):
    shutil.rmtree(source)


def write_other_weights(source, other):
    write_peft(source, other)


def change_the_scale(source, other):
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))


def truncate_the_weights(source, other):
    os.truncate(source / "adapter_model.safetensors", 1000)


LOST_SOURCES = {
    remove: "nor can its source be read: {source}/adapter_config.json: no such file",
    write_other_weights: "its source {source} now has other weights (digest ",
    change_the_scale: "its source {source} now has other weights (digest ",
    truncate_the_weights: "nor can its source be read: {source}/adapter_model.safetensors: not a valid safetensors",
}


@pytest.mark.parametrize("lose", LOST_SOURCES)
def test_lost_spill_file_is_not_replaced_from_another_source(damaged, adapters, tmp_path, lose):
    """Other weights in the source directory are never served under the old digest."""
    source = tmp_path / "source"
    store = damaged(flip_one_bit, source)
    lose(source, adapters[2])
    with pytest.raises(AdapterError, match="was lost.*" + re.escape(LOST_SOURCES[lose].format(source=source))):
        store.wait(adapters[0].digest, TIMEOUT)


# Threads


def test_many_threads_keep_the_store_consistent(open_store, adapters, geometry, size, tmp_path):
    """Six threads prepare, publish, discard, acquire, await, replace and remove while three of eight adapters fit."""
    store = open_store(3 * size)
    directories = [write_peft(tmp_path / f"d{i}", adapter) for i, adapter in enumerate(adapters)]
    expected = {adapter.digest: pack_tiles(adapter, geometry, "float32").pages for adapter in adapters}
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for step in range(40):
                name, index = f"{seed}-{rng.integers(3)}", rng.integers(len(adapters))
                prepared = store.prepare(name, (adapters, directories)[rng.integers(2)][index])
                assert prepared.info.digest == adapters[index].digest
                if rng.random() < 0.3:
                    store.discard(prepared)
                    continue
                digest = store.publish(prepared).digest
                store.acquire(digest)
                if rng.random() < 0.3:
                    store.remove(name)
                tiles = store.request(digest) if step % 2 else store.wait(digest, TIMEOUT)
                if tiles is not None and not np.array_equal(tiles.pages, expected[digest]):
                    failures.append(f"seed {seed}: wrong content")
                store.release(digest)
        except Exception as error:  # noqa: BLE001  reported by the main thread
            failures.append(f"seed {seed}: {error!r}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert failures == []
    for info in store.infos():
        store.remove(info.name)
    stats = store.stats()
    assert (stats.registered, stats.resident_bytes, stats.spilled) == (0, 0, 0)
    assert eventually(lambda: store._spilling_bytes == 0 and spill_files(tmp_path) == [])


def test_bounded_memory_while_many_are_registered(open_store, adapters, size):
    store = open_store(2 * size)
    highest = 0
    for i in range(24):
        load(store, str(i), adapters[i % 8])
        highest = max(highest, store.stats().resident_bytes)
    assert highest <= 2 * size
