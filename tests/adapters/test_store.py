"""The host store: names, content shared by names, reference counts."""

import warnings

import pytest
from store_content import load, same

from slora_jax.adapters import random_adapter, write_peft
from slora_jax.errors import AdapterError

TIMEOUT = 20.0  # seconds; only a failing test waits that long


# Names ----------------------------------------------------------------------------------------------------------------


def test_published_adapter_is_described_and_in_memory(open_store, geometry, tmp_path):
    adapter = random_adapter(geometry, {"q": 4, "down": 12}, seed=1)
    store = open_store(10**9)
    info = load(store, "sql", write_peft(tmp_path / "a", adapter))
    tiles = store.request(store.resolve("sql"))
    assert same(tiles, adapter, geometry)
    assert (info.name, info.digest, info.rank, info.ranks) == ("sql", adapter.digest, 12, (4, 0, 0, 0, 0, 0, 12))
    assert (info.num_pages, info.nbytes) == (tiles.num_pages, tiles.nbytes)
    assert store.info("sql") == info and store.infos() == [info]
    assert store.stats().registered == 1 and store.stats().resident_bytes == info.nbytes


@pytest.mark.parametrize(
    ("trained_on", "warns"),
    [
        (None, False),
        ("meta-llama/Llama-3.2-1B-Instruct", False),
        ("/kaggle/input/llama-3.2-1b-instruct/", False),
        ("unsloth/llama-3.2-1b-instruct-bnb-4bit", True),
        ("somebody/another-model", True),
    ],
)
def test_adapter_made_for_another_base_warns_once(open_store, adapters, tmp_path, trained_on, warns):
    write_peft(tmp_path / "a", adapters[0], base_model_name_or_path=trained_on)
    for names in ((), ("llama-3.2-1b-instruct", "local")):
        store = open_store(10**9)
        store.base_names = frozenset(names)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(store, "sql", tmp_path / "a")
        caught = [warning for warning in caught if warning.category is UserWarning]  # not another test's open sockets
        assert len(caught) == (1 if names and warns else 0)
        for warning in caught:
            assert "'sql'" in str(warning.message) and trained_on in str(warning.message)


def test_two_names_share_one_content_until_both_are_gone(open_store, adapters, size):
    store = open_store(10**9)
    one, two = load(store, "one", adapters[0]), load(store, "two", adapters[0])
    assert one.digest == two.digest and store.stats().resident_bytes == size and store.stats().registered == 2
    store.remove("one")
    assert store.request(two.digest) is not None and store.is_named(two.digest)
    assert store.has("two") and not store.has("one")
    store.remove("two")
    assert not store.is_named(two.digest)
    with pytest.raises(AdapterError, match="no adapter with digest"):
        store.request(two.digest)
    assert store.stats() == type(store.stats())(0, 0, 0, 0, 0)


def test_unknown_name_suggests_the_nearest(open_store, adapters):
    store = open_store(10**9)
    for name in ("sql-expert", "sql-export", "french"):
        load(store, name, adapters[0])
    with pytest.raises(AdapterError, match=r"unknown adapter 'sql-expret'; did you mean 'sql-exp.*', 'sql-exp"):
        store.resolve("sql-expret")
    for method in (store.remove, store.info):
        with pytest.raises(AdapterError, match="unknown adapter 'zzz'; 3 are registered"):
            method("zzz")


def test_new_weights_under_a_name_get_a_new_digest_and_free_the_old(open_store, adapters, size):
    store = open_store(10**9)
    old, new = load(store, "x", adapters[0]), load(store, "x", adapters[1])
    assert store.resolve("x") == new.digest != old.digest
    assert store.stats().registered == 1 and store.stats().resident_bytes == size
    with pytest.raises(AdapterError, match="no adapter with digest"):
        store.request(old.digest)


def test_publishing_the_same_content_again_counts_the_name_once(open_store, adapters):
    store = open_store(10**9)
    for _ in range(3):
        load(store, "x", adapters[0])
    store.remove("x")
    assert store.stats().resident_bytes == 0


def test_failed_registration_changes_nothing(open_store, adapters, tmp_path):
    store = open_store(10**9)
    before = load(store, "x", adapters[0])
    with pytest.raises(AdapterError, match=r"adapter_config\.json: no such file"):
        load(store, "x", tmp_path / "nowhere")
    assert store.info("x") == before and store.request(before.digest) is not None


# References -----------------------------------------------------------------------------------------------------------


def test_acquired_content_survives_removal_and_reload_until_the_last_release(open_store, adapters, geometry):
    store = open_store(10**9)
    digest = load(store, "x", adapters[0]).digest
    store.acquire(digest)
    store.acquire(digest)
    load(store, "x", adapters[1])
    store.remove("x")
    store.release(digest)
    assert same(store.request(digest), adapters[0], geometry) and not store.is_named(digest)
    store.release(digest)
    for method in (store.acquire, store.release, store.request, store.wait):
        with pytest.raises(AdapterError, match="no adapter with digest"):
            method(digest)
    assert store.stats().resident_bytes == 0


def test_release_without_acquire_is_refused(open_store, adapters):
    store = open_store(10**9)
    digest = load(store, "x", adapters[0]).digest
    with pytest.raises(AdapterError, match="is not acquired"):
        store.release(digest)
    assert store.request(digest) is not None


def test_acquired_content_that_was_spilled_survives_removal(open_store, adapters, geometry, size):
    store = open_store(2 * size)
    for i in range(4):
        load(store, str(i), adapters[i])
    digest = adapters[0].digest
    assert store.tiers()[digest] == "disk"
    store.acquire(digest)
    store.remove("0")
    assert same(store.wait(digest, TIMEOUT), adapters[0], geometry)
