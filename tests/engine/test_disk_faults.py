"""Faults of the disk during serving: spilled adapters and their sources are lost, damaged, swapped; the disk is full.

An adapter that cannot be had ends its own requests, with an error that says which, what happened and what to do. The
others' tokens are those of a run without the fault.
"""

import contextlib
import json
import logging
import os
import resource
import shutil
import time

import pytest

from slora_jax import AdapterError
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.adapters.spill import SpillFiles
from slora_jax.memory import PageKind

OTHERS = ["a", "c", "f", "base"]


def delete(path, other):
    path.unlink()


def truncate(path, other):
    os.truncate(path, path.stat().st_size // 2)


def flip_one_bit(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_another_adapters_file(path, other):
    shutil.copyfile(other, path)


def make_unreadable(path, other):
    path.rename(path.with_suffix(".saved"))
    path.symlink_to(path)  # too many levels of symbolic links, also for root


@pytest.fixture(autouse=True)
def remove_saved(six):
    yield
    for path in six.spill_dir.rglob("*.saved"):
        path.unlink()


DAMAGES = [delete, truncate, flip_one_bit, replace_by_another_adapters_file, make_unreadable]


def keep(source, six):
    pass


def remove(source, six):
    shutil.rmtree(source)


def put_other_weights(source, six):
    write_peft(source, six.weights("x"))


def change_the_scale(source, six):
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))


def truncate_the_weights(source, six):
    os.truncate(source / "adapter_model.safetensors", 1000)


LOST_SOURCES = {
    remove: "nor can its source be read: {source}/adapter_config.json: no such file",
    put_other_weights: "its source {source} now has other weights (digest ",
    change_the_scale: "its source {source} now has other weights (digest ",
    truncate_the_weights: "nor can its source be read: {source}/adapter_model.safetensors: not a valid safetensors",
}


def assert_lost(six, output, *reasons) -> None:
    """The request for "b" ended with an error that a user can act on."""
    assert (output.finish_reason, output.token_ids) == ("error", [])
    for part in ("adapter 'b': ", six.digest("b")[:12], *reasons, "load the adapter again"):
        assert part in output.error, output.error


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_spill_file_is_made_up_for_by_the_source(six, tmp_path, caplog, damage) -> None:
    six.load(six.names, tmp_path)
    with caplog.at_level(logging.WARNING, "slora_jax"):
        outputs = six.serve(["a", "c", None], lambda: damage(six.file("b"), six.file("d")), ["b", "f"])
    six.assert_right(outputs, [*OTHERS, "b"])
    assert f"{tmp_path / 'b'} was read again" in caplog.text and six.digest("b")[:12] in caplog.text


@pytest.mark.parametrize("lose", LOST_SOURCES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_adapter_whose_file_and_source_are_lost_ends_its_own_requests(six, tmp_path, damage, lose) -> None:
    """In particular, other weights in its source are not served in its place."""
    six.load(six.names, tmp_path)

    def fault() -> None:
        damage(six.file("b"), six.file("d"))
        lose(tmp_path / "b", six)

    outputs = six.serve(["a", "c", None], fault, ["b", "f"])
    six.assert_right(outputs, OTHERS)
    assert_lost(six, outputs["b"], "spill file ", LOST_SOURCES[lose].format(source=tmp_path / "b"))
    again = "spill file cannot be read" if damage is make_unreadable else "its spill file was found lost before"
    assert_lost(six, six.serve("bc")["b"], again, LOST_SOURCES[lose].format(source=tmp_path / "b"))  # and again
    six.load("b")
    six.assert_right(six.serve("abc"), "abc")


@pytest.mark.parametrize("damage", DAMAGES)
def test_adapter_from_memory_has_no_source(six, damage) -> None:
    six.load(six.names)
    outputs = six.serve(["a", "c", None], lambda: damage(six.file("b"), six.file("d")), ["b", "f"])
    six.assert_right(outputs, OTHERS)
    assert_lost(six, outputs["b"], "it was loaded from memory")
    six.load("b")
    six.assert_right(six.serve("abc"), "abc")


def test_file_that_was_unreadable_for_a_while_is_read_for_the_next_request(six) -> None:
    six.load(six.names)
    file = six.file("b")
    outputs = six.serve(["a", None], lambda: make_unreadable(file, None), ["b", "c"])
    six.assert_right(outputs, ["a", "base", "c"])
    assert_lost(six, outputs["b"], "cannot be read")
    file.with_suffix(".saved").rename(file)
    six.assert_right(six.serve("bc"), "bc")


def test_source_that_was_gone_for_a_while_is_read_for_the_next_request(six, tmp_path) -> None:
    six.load(six.names, tmp_path)
    six.file("b").unlink()
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    assert_lost(six, six.serve("b")["b"], "spill file is missing", "no such file")
    (tmp_path / "elsewhere").rename(tmp_path / "b")
    six.assert_right(six.serve("bc"), "bc")


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError(), SystemExit("the thread ends")], ids=repr)
def test_unforeseen_error_of_the_reading_thread_is_one_adapters(six, monkeypatch, error) -> None:
    six.load(six.names)
    read = SpillFiles.read

    def fail(files, spilled):
        if spilled.digest == six.digest("b"):
            raise error
        return read(files, spilled)

    with monkeypatch.context() as patch:
        outputs = six.serve(["a", None], lambda: patch.setattr(SpillFiles, "read", fail), "bcd")
        six.assert_right(outputs, ["a", "base", "c", "d"])
        assert_lost(six, outputs["b"], type(error).__name__)
    six.assert_right(six.serve("bc"), "bc")  # its file was not the culprit


# Spilling


@contextlib.contextmanager
def file_size_limit(monkeypatch, nbytes):
    """A disk without room: writes of spill files fail half-way, as the system reports it."""
    write = SpillFiles.write

    def limited(files, tiles):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
        try:
            return write(files, tiles)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(SpillFiles, "write", limited)
        yield


def spill_files(six):
    return [path for path in six.spill_dir.rglob("*") if path.is_file()]


def assert_within_budget(six) -> None:
    deadline = time.monotonic() + 20  # the last spill may be under way
    while six.engine.store.stats().resident_bytes > six.nbytes and time.monotonic() < deadline:
        time.sleep(0.001)
    assert six.engine.store.stats().resident_bytes == six.nbytes


def test_full_disk_costs_memory_and_nothing_else(six, monkeypatch, caplog) -> None:
    with caplog.at_level(logging.WARNING, "slora_jax"), file_size_limit(monkeypatch, six.nbytes // 2):
        six.load("abc")
        outputs = six.serve(["a", None], lambda: six.load("def"), "bcdef")
        six.assert_right(outputs, six.expected)
        assert spill_files(six) == [], "not even half a file"
        assert six.engine.store.stats().resident_bytes == 6 * six.nbytes
    (warning,) = caplog.messages  # not one per attempt
    assert f"host_adapter_bytes={six.nbytes} is exceeded" in warning and "File too large" in warning
    assert "make room in spill_dir, or raise host_adapter_bytes" in warning
    six.load("g")  # the disk has room again
    assert_within_budget(six)
    assert six.engine.store.stats().spilled == 6 and len(spill_files(six)) == 6
    six.assert_right(six.serve([*six.names, None]), six.expected)


def test_unforeseen_error_of_a_spill_is_a_full_disk_to_the_cache(six, monkeypatch, caplog) -> None:
    six.load("abc")  # "c" is in memory
    with monkeypatch.context() as patch:
        patch.setattr(SpillFiles, "write", lambda files, tiles: 1 // 0)
        six.load("d")  # on this thread
        six.assert_right(six.serve(["a", None], late="bcd"), ["a", "base", "b", "c", "d"])  # and on the store's
    assert "ZeroDivisionError" in caplog.text
    six.load("ef")
    assert_within_budget(six)
    six.assert_right(six.serve([*six.names, None]), six.expected)


def test_disk_that_fills_up_during_serving(six, monkeypatch, caplog) -> None:
    """What is on disk comes back and what was never written stays."""
    six.load(six.names)
    with caplog.at_level(logging.WARNING, "slora_jax"), file_size_limit(monkeypatch, six.nbytes // 2):
        six.assert_right(six.serve(["a", None], late="bcdef"), six.expected)
        assert any("is exceeded" in message for message in caplog.messages)
        six.load("g")
    assert len(spill_files(six)) == 5
    six.load("h")
    assert_within_budget(six)
    six.assert_right(six.serve([*six.names, None]), six.expected)


@pytest.mark.parametrize("with_sources", [True, False])
def test_spill_directory_removed_during_serving(six, tmp_path, with_sources) -> None:
    six.load(six.names, tmp_path / "sources" if with_sources else None)
    outputs = six.serve(["a", None], lambda: shutil.rmtree(six.spill_dir), "bcdef")
    if with_sources:
        six.assert_right(outputs, six.expected)
    else:
        six.assert_right(outputs, ["a", "base"])
        assert all("spill file is missing" in outputs[name].error for name in "bcdef")
        six.load(six.names)
    assert_within_budget(six)
    assert len(spill_files(six)) >= 5, "spilling goes on in a new directory"
    six.assert_right(six.serve([*six.names, None]), six.expected)


def test_spill_file_removed_while_its_adapter_is_in_memory_is_written_again(six) -> None:
    """As by a cleaner of temporary files: the copy in memory must not be dropped for a file that is gone."""
    six.load(six.names)
    six.assert_right(six.serve("b"), "b")  # read back: in memory, and its file still there
    assert_within_budget(six)
    six.file("b").unlink()
    six.load("g")  # takes the room of "b"
    assert_within_budget(six)
    six.engine.residency.evictor.make_room(six.engine.allocator.capacity, PageKind.KV)
    six.assert_right(six.serve("bc"), "bc")


def test_spill_directory_that_cannot_be_written_for_a_while(six, caplog) -> None:
    shutil.rmtree(six.spill_dir)
    six.spill_dir.write_text("a file where the directory was")
    try:
        with caplog.at_level(logging.WARNING, "slora_jax"):
            six.load(six.names)
        assert "is exceeded" in caplog.text and str(six.spill_dir) in caplog.text
        six.assert_right(six.serve([*six.names, None]), six.expected)
    finally:
        six.spill_dir.unlink()
    six.load("g")
    assert_within_budget(six)
    assert len(spill_files(six)) == 6


# The budget of host memory


def test_adapter_larger_than_host_memory_is_refused_with_the_remedy(six) -> None:
    six.load("a")
    large = random_adapter(six.geometry, 16)

    def load_large() -> None:
        with pytest.raises(AdapterError) as caught:
            six.engine.load_adapter("large", large)
        for part in ("'large'", f"host_adapter_bytes is {six.nbytes}", "raise it to at least "):
            assert part in str(caught.value)

    six.assert_right(six.serve(["a", None], load_large), ["a", "base"])
    assert [info.name for info in six.engine.adapters()] == ["a"]


def test_host_memory_for_one_adapter_serves_any_number(six) -> None:
    six.load(six.names)
    for _ in range(5):
        six.engine.residency.evictor.make_room(six.engine.allocator.capacity, PageKind.KV)  # all come anew
        six.assert_right(six.serve([*six.names, None]), six.expected)
        assert_within_budget(six)
