"""Registration in two steps: prepare on any thread, then publish or discard without touching the disk."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from store_content import eventually, load

from slora_jax.adapters import AdapterStore, random_adapter, write_peft
from slora_jax.errors import AdapterError

TIMEOUT = 20.0  # seconds; only a failing test waits that long


def assert_empty(store) -> None:
    assert store.stats() == type(store.stats())(0, 0, 0, store.stats().spill_writes, store.stats().spill_reads)
    assert store.tiers() == {} and not store._prepared


def test_prepared_content_is_resident_but_not_named(open_store, adapters, size, tmp_path) -> None:
    store = open_store(10**9)
    prepared = store.prepare("sql", write_peft(tmp_path / "a", adapters[0]))
    digest = prepared.info.digest
    assert store.infos() == [] and not store.has("sql") and not store.is_named(digest)
    assert store.holds(digest) and store.stats().resident_bytes == size
    info = store.publish(prepared)
    assert info == prepared.info == store.info("sql") and store.is_named(digest)
    assert info == load(open_store(10**9), "sql", tmp_path / "a")
    store.remove("sql")
    assert_empty(store)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("before", [False, True])
def test_a_name_has_the_content_published_last(open_store, adapters, size, order, before) -> None:
    store = open_store(10**9)
    if before:
        load(store, "x", adapters[2])
    prepared = [store.prepare("x", adapter) for adapter in adapters[:2]]
    for index in order:
        store.publish(prepared[index])
        assert store.resolve("x") == adapters[index].digest
    assert store.tiers() == {adapters[order[1]].digest: "host"} and store.stats().resident_bytes == size
    store.remove("x")
    assert_empty(store)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_content_prepared_twice_is_held_once_until_both_are_gone(open_store, adapters, size, order) -> None:
    store = open_store(10**9)
    prepared = [store.prepare("x", adapters[0]) for _ in range(2)]
    assert store.stats().resident_bytes == size
    store.publish(prepared[order[0]])
    store.remove("x")
    assert store.holds(adapters[0].digest)
    store.publish(prepared[order[1]])
    store.remove("x")
    assert_empty(store)


def test_discarding_frees_memory_and_spill_files(open_store, adapters, size, tmp_path) -> None:
    store = open_store(size)
    prepared = [store.prepare("x", adapter) for adapter in adapters[:3]]
    assert store.stats().spilled == 2
    for one in prepared:
        store.discard(one)
    assert_empty(store)
    assert eventually(lambda: list((tmp_path / "spill").rglob("*.tiles")) == [])
    named = load(store, "x", adapters[0])
    store.discard(store.prepare("x", adapters[0]))
    assert store.infos() == [named] and store.request(named.digest) is not None


def test_a_preparation_is_used_once_and_by_its_own_store(open_store, adapters) -> None:
    store, other = open_store(10**9), open_store(10**9)
    published, discarded = store.prepare("x", adapters[0]), store.prepare("y", adapters[1])
    for method in (other.publish, other.discard):
        with pytest.raises(AdapterError, match="prepare it again"):
            method(published)
    store.publish(published)
    store.discard(discarded)
    for prepared in (published, discarded):
        for method in (store.publish, store.discard):
            with pytest.raises(AdapterError, match="was published or discarded before"):
                method(prepared)
    assert [info.name for info in store.infos()] == ["x"] and store.tiers() == {adapters[0].digest: "host"}
    closing = store.prepare("z", adapters[2])
    store.close()
    for method in (store.publish, store.discard):
        with pytest.raises(AdapterError):
            method(closing)


def test_failed_preparation_changes_nothing(geometry, adapters, tmp_path) -> None:
    with AdapterStore(geometry, "float32", 10**9, max_lora_rank=8, max_pages=2) as store:
        tall, wide = random_adapter(geometry, 9), random_adapter(geometry, 8)
        for adapter, why in ((tall, "max_lora_rank is 8"), (wide, "pages"), (tmp_path / "nowhere", "no such file")):
            with pytest.raises(AdapterError, match=why):
                store.prepare("x", adapter)
        assert_empty(store)


def test_interrupted_preparation_changes_nothing(open_store, adapters, size, monkeypatch) -> None:
    store = open_store(size)
    load(store, "a", adapters[0])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store._files, "write", interrupt)
        store.prepare("b", adapters[1])
    assert store.tiers() == {adapters[0].digest: "host"} and not store._prepared


def test_prepared_content_may_be_spilled_before_it_is_published(open_store, adapters, size, geometry) -> None:
    store = open_store(size)
    prepared = store.prepare("x", adapters[0])
    store.publish(store.prepare("y", adapters[1]))
    assert store.tiers() == {adapters[0].digest: "disk", adapters[1].digest: "host"}
    info = store.publish(prepared)
    assert store.tiers()[info.digest] == "disk"
    assert store.wait(info.digest, TIMEOUT).digest == adapters[0].digest


def test_lost_content_is_read_again_from_the_published_directory(open_store, adapters, size, tmp_path) -> None:
    """The directory of a discarded preparation is deleted; the published one's must not be forgotten for it."""
    store = open_store(size)
    load(store, "x", write_peft(tmp_path / "own", adapters[0]))
    for seed in (1, 2):  # once while it is in memory, once while it is spilled
        store.discard(store.prepare("x", write_peft(tmp_path / "upload", adapters[0])))
        load(store, "other", adapters[seed])
    for path in (tmp_path / "spill").rglob("*.tiles"):
        path.unlink(missing_ok=True)  # the worker may have deleted that of the replaced "other"
    for path in (tmp_path / "upload").iterdir():
        path.unlink()
    assert store.wait(adapters[0].digest, TIMEOUT).digest == adapters[0].digest
    store.publish(store.prepare("x", write_peft(tmp_path / "new", adapters[0])))
    load(store, "other", adapters[3])
    for directory in ("own", "spill"):
        for path in (tmp_path / directory).rglob("*.*"):
            path.unlink(missing_ok=True)
    assert store.wait(adapters[0].digest, TIMEOUT).digest == adapters[0].digest


def test_publishing_discarding_and_removing_touch_no_disk_on_the_callers_thread(
    open_store, adapters, size, tmp_path, monkeypatch
) -> None:
    store = open_store(size)
    files, touched = store._files, []
    for method in ("read", "write", "discard", "is_there"):

        def record(inner, *args):
            touched.append(threading.current_thread().name)
            return inner(*args)

        monkeypatch.setattr(files, method, partial(record, getattr(files, method)))
    with ThreadPoolExecutor(1, "preparing") as pool:
        for seed in (0, 1, 2, 3):
            store.publish(pool.submit(store.prepare, f"a{seed % 2}", adapters[seed]).result())  # 2 and 3 replace
        store.discard(pool.submit(store.prepare, "b", adapters[4]).result())
        store.discard(pool.submit(store.prepare, "a1", adapters[3]).result())
    for name in ("a0", "a1"):
        store.remove(name)
    assert eventually(lambda: list((tmp_path / "spill").rglob("*.tiles")) == [])
    assert store.stats().spill_writes >= 3
    assert {name.split("_")[0] for name in touched} == {"preparing", "slora-adapters"}
    assert_empty(store)


def test_tiers_report_host_or_disk(open_store, adapters, size) -> None:
    store = open_store(2 * size)
    for index in range(4):
        load(store, str(index), adapters[index])
    expected = {adapters[i].digest: ("disk", "disk", "host", "host")[i] for i in range(4)}
    assert store.tiers() == expected
    store.wait(adapters[0].digest, TIMEOUT)
    assert store.tiers()[adapters[0].digest] == "host"
