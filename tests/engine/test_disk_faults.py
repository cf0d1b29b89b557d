"""Disk faults during serving: spill files and source directories are lost, damaged or replaced; the disk is full.

A lost adapter ends its own requests, with an error that names the adapter, the cause and the remedy. Other requests get
the tokens of a run without the fault. `tests/adapters/test_store_spill.py` has every kind of damage.
"""

import contextlib
import logging
import resource
import shutil
import time

import pytest

from slora_jax.adapters import write_peft
from slora_jax.adapters.spill import SpillFiles
from slora_jax.memory import PageKind

OTHERS = ["a", "c", "f", "base"]


def flip_one_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(autouse=True)
def remove_saved(six):
    yield
    for path in six.spill_dir.rglob("*.saved"):
        path.unlink()


def assert_lost(six, output, *reasons) -> None:
    """Checks the error of the request for "b"."""
    assert (output.finish_reason, output.token_ids) == ("error", [])
    for part in ("adapter 'b': ", six.digest("b")[:12], *reasons, "load the adapter again"):
        assert part in output.error, output.error


def test_damaged_spill_file_is_replaced_from_the_source(six, tmp_path, caplog) -> None:
    six.load(six.names, tmp_path)
    with caplog.at_level(logging.WARNING, "slora_jax"):
        outputs = six.serve(["a", "c", None], lambda: flip_one_bit(six.file("b")), ["b", "f"])
    six.assert_right(outputs, [*OTHERS, "b"])
    assert f"{tmp_path / 'b'} was read again" in caplog.text and six.digest("b")[:12] in caplog.text


def test_adapter_whose_file_and_source_are_lost_ends_its_own_requests(six, tmp_path) -> None:
    six.load(six.names, tmp_path)

    def fault() -> None:
        flip_one_bit(six.file("b"))
        write_peft(tmp_path / "b", six.weights("x"))

    outputs = six.serve(["a", "c", None], fault, ["b", "f"])
    six.assert_right(outputs, OTHERS)
    other = f"its source {tmp_path / 'b'} now has other weights (digest "
    assert_lost(six, outputs["b"], "spill file ", other)
    assert_lost(six, six.serve("bc")["b"], "its spill file was found lost before", other)
    six.load("b")
    six.assert_right(six.serve("abc"), "abc")


def test_temporarily_unreadable_file_is_read_for_the_next_request(six) -> None:
    six.load(six.names)
    file = six.file("b")

    def fault() -> None:
        file.rename(file.with_suffix(".saved"))
        file.symlink_to(file)  # too many levels of symbolic links, also for root

    outputs = six.serve(["a", None], fault, ["b", "c"])
    six.assert_right(outputs, ["a", "base", "c"])
    assert_lost(six, outputs["b"], "cannot be read")
    file.with_suffix(".saved").rename(file)
    six.assert_right(six.serve("bc"), "bc")


def test_temporarily_missing_source_is_read_for_the_next_request(six, tmp_path) -> None:
    six.load(six.names, tmp_path)
    six.file("b").unlink()
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    assert_lost(six, six.serve("b")["b"], "spill file is missing", "no such file")
    (tmp_path / "elsewhere").rename(tmp_path / "b")
    six.assert_right(six.serve("bc"), "bc")


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit("the thread ends")], ids=repr)
def test_unexpected_error_of_the_reading_thread_affects_one_adapter(six, monkeypatch, error) -> None:
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
    six.assert_right(six.serve("bc"), "bc")  # its file is intact


# Spilling


@contextlib.contextmanager
def file_size_limit(monkeypatch, nbytes):
    """Makes writes of spill files fail half-way, as on a full disk."""
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


def test_full_disk_exceeds_the_memory_budget_and_loses_nothing(six, monkeypatch, caplog) -> None:
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


def test_unexpected_error_of_a_spill_is_handled_like_a_full_disk(six, monkeypatch, caplog) -> None:
    six.load("abc")  # "c" is in memory
    with monkeypatch.context() as patch:
        patch.setattr(SpillFiles, "write", lambda files, tiles: 1 // 0)
        six.load("d")  # on the calling thread
        six.assert_right(
            six.serve(["a", None], late="bcd"), ["a", "base", "b", "c", "d"]
        )  # and on the thread of the store
    assert "ZeroDivisionError" in caplog.text
    six.load("ef")
    assert_within_budget(six)
    six.assert_right(six.serve([*six.names, None]), six.expected)


def test_disk_that_fills_up_during_serving(six, monkeypatch, caplog) -> None:
    """Spilled adapters are read back; the others stay in memory."""
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
def test_spill_directory_deleted_during_serving(six, tmp_path, with_sources) -> None:
    six.load(six.names, tmp_path / "sources" if with_sources else None)
    outputs = six.serve(["a", None], lambda: shutil.rmtree(six.spill_dir), "bcdef")
    if with_sources:
        six.assert_right(outputs, six.expected)
    else:
        six.assert_right(outputs, ["a", "base"])
        assert all("spill file is missing" in outputs[name].error for name in "bcdef")
        six.load(six.names)
    assert_within_budget(six)
    assert len(spill_files(six)) >= 5, "spilling continues in a new directory"
    six.assert_right(six.serve([*six.names, None]), six.expected)


def test_spill_file_deleted_while_its_adapter_is_in_memory_is_written_again(six) -> None:
    """Something that cleans temporary files may delete it; the copy in memory must not be dropped then."""
    six.load(six.names)
    six.assert_right(six.serve("b"), "b")  # read back: in memory and on disk
    assert_within_budget(six)
    six.file("b").unlink()
    six.load("g")  # takes the room of "b"
    assert_within_budget(six)
    six.engine.residency.evictor.make_room(six.engine.allocator.capacity, PageKind.KV)
    six.assert_right(six.serve("bc"), "bc")


def test_spill_directory_that_temporarily_cannot_be_written(six, caplog) -> None:
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
