"""Reading safetensors without a memory map: like the library for valid files, an error if a file changes."""

import os

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from slora_jax.adapters import peft_format, random_adapter, read_peft, write_peft
from slora_jax.adapters.untrusted.tensor_file import DTYPES, TensorFile
from slora_jax.errors import AdapterError

JSON_BYTES = list(b'0123456789{}[]",:abc F\\')


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Up to two bytes of the header replaced or flipped; sometimes cut."""
    damaged = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.integers(3)):
        at = rng.integers(header)
        damaged[at] = rng.choice(JSON_BYTES) if rng.random() < 0.7 else damaged[at] ^ 1 << rng.integers(8)
    return bytes(damaged[: rng.integers(len(damaged))] if rng.random() < 0.1 else damaged)


def test_accepts_the_same_files_as_safetensors(tmp_path, rng) -> None:
    tensors = {
        "a": rng.random((3, 4), np.float32),
        "b.c": rng.random(2).astype(np.float16),
        "e": np.zeros((0, 3), "f4"),
    }
    sound, path, accepted, refused = save(tensors), tmp_path / "x.safetensors", 0, 0
    for _ in range(1000):
        content = damaged(sound, rng)
        path.write_bytes(content)
        try:
            expected = dict(deserialize(content))
        except SafetensorError as error:
            if "unknown variant" in str(error):
                continue  # dtypes that the format does not have are refused by the caller
            expected = None
        try:
            with TensorFile(path) as file:
                found = {n: file.read(n) for n, entry in file.entries.items() if entry.dtype in DTYPES}
                assert file.entries.keys() == (expected or {}).keys(), content
        except AdapterError as error:
            assert expected is None, content
            assert "not a valid safetensors file" in str(error)
            refused += 1
            continue
        assert expected is not None, content
        assert all(array.tobytes() == bytes(expected[name]["data"]) for name, array in found.items())
        accepted += 1
    print(accepted, "accepted,", refused, "refused")
    assert accepted > 100 and refused > 100


def test_unknown_element_type_is_refused_by_name(geometry, tmp_path) -> None:
    file = write_peft(tmp_path, random_adapter(geometry, 2)) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"X32"', 1))
    with pytest.raises(AdapterError, match="expected F16, BF16, F32, found X32"):
        read_peft(tmp_path, geometry)


def test_file_truncated_after_its_header_was_read_is_an_error(geometry, tmp_path) -> None:
    """Under a memory map this ends the process: SIGBUS."""
    path = write_peft(tmp_path, random_adapter(geometry, 64)) / "adapter_model.safetensors"
    with TensorFile(path) as file:
        os.truncate(path, 8192)
        with pytest.raises(AdapterError, match="truncated while it was read"):
            for name in file.entries:
                file.read(name)


@pytest.mark.parametrize("changed", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_written_during_the_read_are_refused(geometry, tmp_path, monkeypatch, changed) -> None:
    """A new config with the old weights would be a silently wrong scale."""
    new = write_peft(tmp_path / "new", random_adapter(geometry, 4, alpha=64, seed=1))
    old = write_peft(tmp_path / "old", random_adapter(geometry, 4, alpha=4))

    def read_late(*args):
        adapter = original(*args)
        os.replace(new / changed, old / changed)
        return adapter

    original = peft_format._read_peft
    monkeypatch.setattr(peft_format, "_read_peft", read_late)
    with pytest.raises(AdapterError, match="changed while they were read; load it again"):
        read_peft(old, geometry)
