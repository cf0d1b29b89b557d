"""The host store beyond its memory budget: LRU spill, read-back in the background, failures, many threads."""

import errno
import logging
import threading
import time

import numpy as np
import pytest
from store_content import load, same

from slora_jax.adapters import AdapterStore, pack_tiles, write_peft
from slora_jax.errors import AdapterError, ConfigError

TIMEOUT = 20.0  # seconds; only a failing test waits that long


def spill_files(tmp_path):
    return sorted((tmp_path / "spill").rglob("*.tiles"))


def resident(store, adapters):
    tiers = store.tiers()
    return [i for i, adapter in enumerate(adapters) if tiers[adapter.digest] == "host"]


def eventually(condition):
    """Whether the condition comes true; the worker may still be finishing what it had begun."""
    deadline = time.monotonic() + TIMEOUT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


# Spill ----------------------------------------------------------------------------------------------------------------


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


def test_content_just_read_back_is_not_the_next_victim(open_store, adapters, size):
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


# Failures -------------------------------------------------------------------------------------------------------------


def test_full_disk_keeps_the_adapter_in_memory_and_warns(open_store, adapters, geometry, size, tmp_path, caplog):
    store = open_store(size)

    def disk_full(tiles):
        raise OSError(errno.ENOSPC, "No space left on device")

    write, store._files.write = store._files.write, disk_full
    with caplog.at_level(logging.WARNING):
        load(store, "0", adapters[0])
        load(store, "1", adapters[1])
    assert "No space left on device" in caplog.text and f"host_adapter_bytes={size} is exceeded" in caplog.text
    assert resident(store, adapters[:2]) == [0, 1] and store.stats().resident_bytes == 2 * size
    store._files.write = write
    load(store, "2", adapters[2])  # the disk works again: back within the budget
    assert store.stats().resident_bytes == size and store.stats().spilled == 2
    assert same(store.wait(adapters[0].digest, TIMEOUT), adapters[0], geometry)


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


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [delete, truncate, flip_one_bit])
def test_lost_spill_file_is_that_adapters_error_alone(open_store, adapters, geometry, size, tmp_path, damage):
    store = open_store(size)
    for i in range(3):
        load(store, str(i), adapters[i])
    lost = next(path for path in spill_files(tmp_path) if path.name.startswith(adapters[0].digest[:16]))
    damage(lost)
    with pytest.raises(AdapterError, match=r"was lost: .*spill file is (damaged|missing)"):
        store.wait(adapters[0].digest, TIMEOUT)
    for method in (store.request, store.wait):  # the error is kept
        with pytest.raises(AdapterError, match="was lost"):
            method(adapters[0].digest)
    assert same(store.wait(adapters[1].digest, TIMEOUT), adapters[1], geometry)
    load(store, "0", adapters[0])  # registering the content again heals it
    assert same(store.wait(adapters[0].digest, TIMEOUT), adapters[0], geometry)
    for name in ("0", "1", "2"):
        store.remove(name)
    assert store.stats().resident_bytes == 0 and store.stats().spilled == 0
    assert eventually(lambda: spill_files(tmp_path) == [])


def test_lost_spill_file_is_replaced_from_an_unchanged_source(open_store, adapters, geometry, size, tmp_path, caplog):
    store = open_store(size)
    load(store, "0", write_peft(tmp_path / "source", adapters[0]))
    load(store, "1", adapters[1])
    spill_files(tmp_path)[0].unlink()
    with caplog.at_level(logging.WARNING):
        assert same(store.wait(adapters[0].digest, TIMEOUT), adapters[0], geometry)
    assert "read again" in caplog.text


def test_lost_spill_file_is_not_replaced_from_a_changed_source(open_store, adapters, size, tmp_path):
    store = open_store(size)
    load(store, "0", write_peft(tmp_path / "source", adapters[0]))
    load(store, "1", adapters[1])
    write_peft(tmp_path / "source", adapters[2])
    spill_files(tmp_path)[0].unlink()
    with pytest.raises(AdapterError, match="was lost"):
        store.wait(adapters[0].digest, TIMEOUT)


# Threads --------------------------------------------------------------------------------------------------------------


def test_many_threads_keep_the_store_consistent(open_store, adapters, geometry, size, tmp_path):
    """Six threads publish, acquire, await, reload and remove while only three of eight adapters fit in memory."""
    store = open_store(3 * size)
    expected = {adapter.digest: pack_tiles(adapter, geometry, "float32").pages for adapter in adapters}
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for step in range(60):
                name = f"{seed}-{rng.integers(3)}"
                adapter = adapters[rng.integers(len(adapters))]
                digest = load(store, name, adapter).digest
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
