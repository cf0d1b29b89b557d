"""Damaged and hostile adapter directories: each is refused with file, tensor, expected and found.

A refusal takes bounded time and memory, and its message has a bounded size. A file that blocks or an expression that
never ends would hang this process, so each directory is read by a daemon thread with a timeout.
"""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slora_jax.adapters import AdapterStore, peft_format, random_adapter, read_peft, write_peft
from slora_jax.adapters.config import MAX_BYTES, MAX_ITEMS, LoraConfig
from slora_jax.adapters.untrusted.patterns import SECONDS as SECONDS_OF_MATCHING
from slora_jax.adapters.untrusted.patterns import Matcher, check_pattern
from slora_jax.adapters.untrusted.tensor_file import MAX_HEADER, TensorFile
from slora_jax.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 20.0  # only a failing test waits that long
PEAK = 64 << 20  # bytes that a refusal may need at most
NAME = "model.layers.31.self_attn.q_proj"
Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def directory(tmp_path, geometry):
    """A valid adapter, for the test to damage."""
    return write_peft(tmp_path / "adapter", random_adapter(geometry, 4))


def resident(what: str) -> int:
    """Bytes of this process in memory: current ("RSS") or peak ("HWM")."""
    return 1024 * int(re.search(rf"Vm{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def refusal(directory, geometry, seconds: float = SECONDS) -> str:
    """Returns the error message of a read. Fails without one, or if time, memory or the message exceed their bound."""
    result: list[BaseException | None] = []

    def read() -> None:
        try:
            read_peft(directory, geometry)
            result.append(None)
        except BaseException as error:  # noqa: BLE001  checked by the caller
            result.append(error)

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("RSS")
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    assert isinstance(result[0], AdapterError), result[0]
    assert resident("HWM") - before < PEAK
    message = str(result[0])
    assert len(message) < 1500 + 2 * len(str(directory)), len(message)
    return message.replace(str(directory), "DIR")


def edit_config(directory, **fields) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields))


def edit_tensors(directory, edit) -> None:
    """`edit` changes the dictionary of tensors in place."""
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


def header_of(directory) -> tuple[dict, bytes]:
    content = (directory / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_header(directory, header: object, body: bytes = b"", size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with (directory / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + body)
        if size is not None:
            file.truncate(8 + len(text) + size)  # sparse


# Special files


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    "kind", ["missing", "fifo", "device", "directory", "socket", "link to a device", "loop", "dangling link"]
)
def test_only_regular_files_are_read(directory, geometry, file, kind) -> None:
    path = directory / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        try:
            os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("needs the right to make devices")
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(directory)  # its path may be too long for a socket
            server.bind(file)
            os.chdir(here)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(file)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    message = refusal(directory, geometry)
    assert f"DIR/{file}: " in message
    assert ("no such file" if kind in ("missing", "dangling link") else "cannot be read") in message


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_file_replaced_by_a_fifo_before_it_is_opened_is_refused(directory, geometry, file, monkeypatch) -> None:
    path, stat = directory / file, os.stat

    def swap(name, *args, **options):
        result = stat(name, *args, **options)
        if os.fspath(name) == str(path) and not fifo:
            os.unlink(path)
            os.mkfifo(path)
            fifo.append(path)
        return result

    fifo: list = []
    monkeypatch.setattr("slora_jax.adapters.untrusted.plain_file.os.stat", swap)
    monkeypatch.setattr(peft_format, "_versions", lambda directory: [])
    assert "not a regular file" in refusal(directory, geometry)


def test_symbolic_links_to_regular_files_are_read(directory, geometry, tmp_path) -> None:
    """The Hugging Face cache consists of such links."""
    (tmp_path / "links").mkdir()
    for file in (CONFIG, WEIGHTS):
        (tmp_path / "links" / file).symlink_to(directory / file)
    assert read_peft(tmp_path / "links", geometry).digest == read_peft(directory, geometry).digest


@pytest.mark.parametrize("pickle", ["file", "fifo"])
def test_pickles_are_never_opened(directory, geometry, pickle) -> None:
    (directory / WEIGHTS).unlink()
    path = directory / "adapter_model.bin"
    os.mkfifo(path) if pickle == "fifo" else path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    accessed = os.stat(path).st_atime_ns
    message = refusal(directory, geometry)
    for part in ("adapter_model.bin", "unpickling can run arbitrary code", "safe_serialization=True"):
        assert part in message
    assert os.stat(path).st_atime_ns == accessed


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("secret", [b"TOPSECRT-key-of-another-user\n" * 40, b'{"password": "TOPSECRT"}'])
def test_errors_do_not_quote_the_content_of_a_linked_file(directory, geometry, tmp_path, file, secret) -> None:
    (tmp_path / "secret").write_bytes(secret)
    (directory / file).unlink()
    (directory / file).symlink_to(tmp_path / "secret")
    message = refusal(directory, geometry)
    assert "TOPSECRT" not in message and "password" not in message
    assert str(int.from_bytes(secret[:8], "little")) not in message


# adapter_config.json


DEEP = 5000
CONFIGS = {
    "empty": (b"", "not valid JSON"),
    "not an object": (b"[1, 2]", "expected a JSON object"),
    "huge": (b" " * (MAX_BYTES + 1), "larger than"),
    "huge and sparse": (None, "larger than"),
    "deep list": (b'{"peft_type": "LORA", "x": ' + b"[" * DEEP + b"]" * DEEP + b"}", ""),
    "deeper list": (b"[" * (MAX_BYTES // 2), "not valid JSON"),
    "deep object": (b'{"a":' * 100_000, "not valid JSON"),
    "huge integer": (b'{"peft_type": "LORA", "r": ' + b"9" * 900_000 + b"}", "not valid JSON"),
    "large integer": (b'{"peft_type": "LORA", "r": ' + b"9" * 4000 + b"}", "r: rank must be"),
    "infinite": (b'{"peft_type": "LORA", "lora_alpha": Infinity}', "lora_alpha: must be a finite number"),
    "overflowing": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha: must be a finite number"),
    "not a number": (b'{"peft_type": "LORA", "rank_pattern": {"q_proj": NaN}}', "rank must be an integer"),
    "not UTF-8": (b'{"peft_type": "\xff\xfe\xfd"}', "not valid JSON"),
    "null bytes": (b"\0" * 5000, "not valid JSON"),
    "duplicate": (b'{"peft_type": "LORA", "r": 4, "r": 8}', "'r' occurs twice"),
    "duplicate among many": (
        b"{" + b",".join(b'"%d": 0' % n for n in range(80_000)) + b', "79999": 1}',
        "'79999' occurs twice",
    ),
    "long duplicate": (b'{"' + b"x" * 400_000 + b'": 0, "' + b"x" * 400_000 + b'": 0}', "occurs twice"),
    "long field": (b'{"peft_type": "LORA", "' + b"x" * 1_000_000 + b'": 1}', "unknown field"),
    "long type": (b'{"peft_type": "' + b"x" * 1_000_000 + b'"}', "peft_type: expected 'LORA'"),
    "long bias": (b'{"peft_type": "LORA", "bias": "' + b"x" * 1_000_000 + b'"}', "bias: must be 'none'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_config_file_is_refused(directory, geometry, name) -> None:
    content, reason = CONFIGS[name]
    if content is None:
        os.truncate(directory / CONFIG, 1 << 40)
    else:
        (directory / CONFIG).write_bytes(content)
    message = refusal(directory, geometry)
    assert message.startswith(f"DIR/{CONFIG}: ") and reason in message


LONG = "x" * 900_000
FIELDS = {
    "very many targets": ({"target_modules": [str(n) for n in range(MAX_ITEMS + 1)]}, "target_modules: must have at"),
    "very many exclusions": ({"exclude_modules": ["x"] * 100_000}, "exclude_modules: must have at most"),
    "very many layers": ({"layers_to_transform": [7] * 300_000}, "layers_to_transform: must have at most"),
    "very many patterns": ({"rank_pattern": {str(n): 1 for n in range(50_000)}}, "rank_pattern: must have at most"),
    "long target": ({"target_modules": [LONG]}, "target_modules: ('xxx"),
    "long expression": ({"target_modules": LONG}, "target_modules: 'xxx"),
    "long pattern": ({"alpha_pattern": {LONG: 1}}, "alpha_pattern: '(.*"),
    "long pattern's value": ({"alpha_pattern": {LONG: "x"}}, "alpha_pattern['xxx"),
    "long group": ({"target_modules": "(?P=" + "x" * 3000 + ")"}, "is not a regular expression"),
    "long value": ({"layers_to_transform": LONG}, "layers_to_transform: must be"),
    "matches nothing": ({"target_modules": ["x" * 100] * 4000}, "matches no projection"),
    "contradiction": ({"target_modules": "." * 3999, "layers_to_transform": [1]}, "cannot be combined"),
    "deep expression": ({"target_modules": "(?:" * 1200 + ")" * 1200}, "target_modules: '(?:(?:"),
    "repeats": ({"target_modules": "a{65535}" * 400}, "repeats more than 999 times"),
    "nested repeats": ({"target_modules": "((a{1,65535}){1,65535}){1,65535}"}, "repeats more than 999 times"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_hostile_field_is_refused_by_name(directory, geometry, name) -> None:
    fields, reason = FIELDS[name]
    edit_config(directory, **fields)
    assert reason in refusal(directory, geometry)


# Regular expressions


SLOW = [
    r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3[A-Z]",
    r"(?:(.)|(.)|(..))+(?!\1)[A-Z]",
    r"(x?.|.x?)*[A-Z]",
    r"(?:.|(.)|(?:.))*$(?<=!)",
]
"""Exponential for `re` and for our matcher, which must stop them."""
GUARDED = [r"(?:(?:\w|[a-z._0-9])+)+[!-+]", r"(.+.+)+(?<=[!])", r"(?=((.+)+)+[A-Z]).*", r"(\w+\.?\w*)+[A-Z]"]
"""Exponential for `re`, fast for our matcher."""
READ_ALL = """
import json, sys, threading, time
from slora_jax.adapters.config import LoraConfig
from slora_jax.adapters.targets import resolve_targets
from slora_jax.errors import AdapterError

ticks = 0
def tick():
    global ticks
    while True:
        time.sleep(0.001)
        ticks += 1

threading.Thread(target=tick, daemon=True).start()
results = []
for fields in json.load(sys.stdin):
    before, start = ticks, time.process_time()
    try:
        resolve_targets(LoraConfig.from_json({"peft_type": "LORA", "target_modules": ["q_proj"]} | fields), 80)
        message = None
    except AdapterError as error:
        message = str(error)
    results.append((message, time.process_time() - start, ticks - before))
print(json.dumps(results))
"""


def test_exponential_expressions_are_stopped_by_processor_time() -> None:
    """Runs in a process that can be killed, because a match that is not stopped never returns."""
    slow = [{"target_modules": SLOW[0]}, {"exclude_modules": SLOW[1]}, {"rank_pattern": {SLOW[2]: 4}}]
    slow += [{"alpha_pattern": {SLOW[3]: 4}}, {"layers_pattern": [SLOW[0]], "layers_to_transform": [0]}]
    many = [{"rank_pattern": {f"{SLOW[2]}{n}": 4 for n in range(400)}}]  # one bound for all together
    guarded = [{"target_modules": pattern} for pattern in GUARDED]
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL],
        input=json.dumps(slow + many + guarded),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    results = json.loads(done.stdout)
    for fields, (message, seconds, ticks) in zip(slow + many, results, strict=False):
        field = next(iter(fields))
        assert message.startswith(f"{field}: ") and "processor time" in message, message
        assert len(message) < 500
        assert seconds < 5 * SECONDS_OF_MATCHING, (fields, seconds)
        assert ticks > 10, "other threads ran meanwhile"
    for message, seconds, _ in results[len(slow + many) :]:
        assert "matches no projection" in message and seconds < SECONDS_OF_MATCHING


@pytest.mark.parametrize("pattern", [r"[[:alpha:]]*q_proj", r".*(?:q_proj){e<=1}", r".*{i}", r"\p{L}+", r"(?V1).*"])
def test_syntax_that_re_does_not_have_is_refused(pattern) -> None:
    with pytest.raises(AdapterError, match="^target_modules: .* is not a regular expression"):
        check_pattern("target_modules", pattern)


PIECES = ["q_proj", "layers", r"\.", ".", ".*", "(", ")", "(?:", "|", "[0-3]", r"\d+", "?", "*", "+", "{2}", "{1,3}",
          "^", "$", r"\b", "(?i)", "(?!", "(?<=", "[^.]", "model", r"\w", "{,2}", "[[", "]", "-", r"\1"]  # fmt: skip


def test_random_expressions_match_as_with_re(rng) -> None:
    """Expressions that `re` cannot compile are refused."""
    names = [NAME, "model.layers.0.mlp.down_proj", "lm_head", "model.norm"]
    compared = refused = 0
    matched = [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `re` warns about sets
        for _ in range(2000):
            pattern = "".join(rng.choice(PIECES, rng.integers(1, 7)))
            try:
                re.compile(pattern)
            except re.error:
                with pytest.raises(AdapterError):
                    check_pattern("x", pattern)
                refused += 1
                continue
            check_pattern("x", pattern)
            matcher = Matcher()
            for name in names:
                for index, how in enumerate(("fullmatch", "match")):
                    expected = getattr(re, how)(pattern, name)
                    found = getattr(matcher, how)("x", pattern, name)
                    assert bool(found) == bool(expected), (how, pattern, name)
                    matched[index] += bool(found)
            compared += 1
    print(compared, "compared,", refused, "refused, matches:", matched)
    assert compared > 300 and refused > 300 and min(matched) > 60


# adapter_model.safetensors


def entry(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_header_is_bounded_before_it_is_read(directory, geometry) -> None:
    with (directory / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(1 << 40)
    assert f"its header must have 2 to {MAX_HEADER} bytes" in refusal(directory, geometry)


ONE = entry([4, 24], 0, 384)
HEADERS = {
    "empty": b"",
    "not JSON": b"{not json",
    "deep list": b"[" * (MAX_HEADER - 8),
    "deep object": b'{"a":' * 100_000,
    "long list": b"[" + b"[]," * 600_000 + b"[]]",
    "huge integer": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "not UTF-8": b"\xff" * 1000,
    "null": b"null",
    "deep metadata": b'{"__metadata__": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    "duplicate": b'{"a": {}, "a": {}}',
    "huge shape": {Q0_A: ONE | {"shape": [1 << 40, 1 << 40]}},
    "shape larger than its bytes": {Q0_A: ONE | {"shape": [1 << 30, 24]}},
    "negative shape": {Q0_A: ONE | {"shape": [-4, -24]}},
    "beyond the file": {Q0_A: ONE | {"data_offsets": [0, 1 << 50]}},
    "reversed offsets": {Q0_A: ONE | {"data_offsets": [384, 0]}},
    "overlap": {Q0_A: ONE, Q0_B: ONE},
    "bytes missing": {Q0_A: ONE | {"shape": [4, 25], "data_offsets": [0, 400]}},
    "bytes left over": {Q0_A: ONE | {"shape": [4, 23], "data_offsets": [0, 368]}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_invalid_header_is_refused(directory, geometry, header) -> None:
    write_header(directory, header, bytes(384))
    assert f"DIR/{WEIGHTS}: not a valid safetensors file" in refusal(directory, geometry)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_file_is_refused(directory, geometry, keep) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert "not a valid safetensors file" in refusal(directory, geometry)


def test_shapes_are_checked_before_memory_is_allocated(directory, geometry) -> None:
    """The tensors have terabytes, in a sparse file."""
    header, _ = header_of(directory)
    header.pop("__metadata__", None)
    names, size = list(header), 1 << 38
    huge = {name: entry([4, size // 16], i * size, (i + 1) * size) for i, name in enumerate(names)}
    write_header(directory, huge, size=len(names) * size)
    assert "expected shape" in refusal(directory, geometry)
    extra = dict(header) | {"base_model.model.x": entry([size // 4], 0, size)}
    first = {name: entry(h["shape"], *(n + size for n in h["data_offsets"])) for name, h in header.items()}
    write_header(directory, extra | first, size=size + max(h["data_offsets"][1] for h in header.values()))
    assert "unexpected tensor 'base_model.model.x'" in refusal(directory, geometry)


@pytest.mark.parametrize(
    "shape",
    [[4, 2**62], [2**63, 4], [4, -6], [4, 6.0], [4, True], [2**32, 2**32], [0, 24], [4, 0], [], [24], [1] * 9,
     [[4], 24], "4,24", None, [4, 24, 1], [24, 4], [256, 24], [5, 24]],
    ids=str,
)  # fmt: skip
def test_shape_other_than_the_base_models_is_refused(directory, geometry, shape) -> None:
    header, body = header_of(directory)
    name = next(n for n in header if "q_proj.lora_A" in n)
    header[name]["shape"] = shape
    write_header(directory, header, body)
    assert re.search("not a valid safetensors file|expected shape", refusal(directory, geometry))
    if isinstance(shape, list) and shape and all(type(n) is int and 0 <= n < 1000 for n in shape) and len(shape) < 9:
        size = 4 * int(np.prod(shape))  # again, with as many bytes as the shape needs
        alone = {name: entry(shape, 0, size)}
        rest = {n: e for n, e in header.items() if n not in (name, "__metadata__")}
        for other, fields in rest.items():
            length = fields["data_offsets"][1] - fields["data_offsets"][0]
            alone[other], size = entry(fields["shape"], size, size + length), size + length
        write_header(directory, alone, size=size)
        assert "expected shape [4, 24]" in refusal(directory, geometry)


@pytest.mark.parametrize("dtype", ["F64", "I8", "U64", "BOOL", "F8_E4M3", "BF16", "x" * 500_000, 7, None, ["F32"]])
def test_element_type_that_disagrees_with_the_bytes_is_refused(directory, geometry, dtype) -> None:
    header, body = header_of(directory)
    name = next(n for n in header if "lora_A" in n)
    header[name]["dtype"] = dtype
    write_header(directory, header, body)
    assert re.search("not a valid safetensors file|expected F16, BF16, F32", refusal(directory, geometry))


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_other_element_types_are_refused(directory, geometry, dtype) -> None:
    edit_tensors(directory, lambda t: t.update({Q0_A: t[Q0_A].astype(dtype)}))
    message = refusal(directory, geometry)
    assert Q0_A in message and "expected F16, BF16, F32, found " in message


@pytest.mark.parametrize(("tensor", "shape"), [(Q0_A, "[4, 24], found [4, 25]"), (Q0_B, "[32, 4], found [33, 4]")])
def test_shape_of_another_base_model_is_explained(directory, geometry, tensor, shape) -> None:
    rows, columns = (0, 1) if tensor == Q0_A else (1, 0)
    edit_tensors(directory, lambda t: t.update({tensor: np.pad(t[tensor], [(0, rows), (0, columns)])}))
    message = refusal(directory, geometry)
    for part in (tensor, f"expected shape {shape}", "probably trained on another base model"):
        assert part in message


@pytest.mark.parametrize("tensor", [Q0_A, Q0_B])
def test_rank_other_than_the_configs_is_refused(directory, geometry, tensor) -> None:
    axis = 0 if tensor == Q0_A else 1
    edit_tensors(directory, lambda t: t.update({tensor: np.ascontiguousarray(np.delete(t[tensor], 0, axis))}))
    message = refusal(directory, geometry)
    assert tensor in message and "says rank 4, the tensor has rank 3" in message


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.float32, np.nan), (np.float16, np.inf), (ml_dtypes.bfloat16, -np.inf)]
)
def test_value_that_is_not_finite_is_refused(directory, geometry, dtype, value) -> None:
    def edit(tensors) -> None:
        tensors[Q0_B] = tensors[Q0_B].astype(dtype)
        tensors[Q0_B][31, 3] = value

    edit_tensors(directory, edit)
    message = refusal(directory, geometry)
    assert Q0_B in message and "found NaN or infinity" in message


@pytest.mark.parametrize("tensor", [Q0_A, Q0_B, None])
def test_missing_tensor_of_a_targeted_module_is_refused(directory, geometry, tensor) -> None:
    """None: the file has no tensor at all."""
    edit_tensors(directory, lambda t: t.clear() if tensor is None else t.pop(tensor))
    assert f"missing tensor {tensor or Q0_A!r}" in refusal(directory, geometry)


PREFIX = "base_model.model.model"
UNEXPECTED = {
    f"{PREFIX}.layers.0.self_attn.q_proj.lora_magnitude_vector": "a DoRA magnitude",
    f"{PREFIX}.layers.0.self_attn.q_proj.lora_magnitude_vector.weight": "a DoRA magnitude",
    f"{PREFIX}.embed_tokens.lora_embedding_A": "does not target this module",
    f"{PREFIX}.embed_tokens.weight": "resized vocabulary",
    f"{PREFIX}.norm.weight": "a fully trained module",
    "base_model.model.lm_head.lora_A.weight": "does not target this module",
    f"{PREFIX}.embed_tokens.token_adapter.trainable_tokens_delta": "does not target this module",
    f"{PREFIX}.layers.0.self_attn.q_proj.lora_B.bias": "a bias",
    f"{PREFIX}.layers.0.self_attn.q_proj.bias": "a bias",
    f"{PREFIX}.layers.0.self_attn.qkv_proj.lora_A.weight": "no known LoRA weight",
    f"{PREFIX}.layers.00.self_attn.q_proj.lora_A.weight": "no known LoRA weight",
    f"{PREFIX}.layers.-1.self_attn.q_proj.lora_A.weight": "no known LoRA weight",
    "": "no known LoRA weight",
    f"{PREFIX}.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight": f"expected the prefix '{PREFIX}.layers.',"
    f" found '{PREFIX}.vision_tower.encoder.'",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": f"expected the prefix '{PREFIX}.layers.', "
    "found 'lora_te_text_model",
    f"{PREFIX}.layers.3.self_attn.q_proj.lora_A.weight": "another base model",
    f"{PREFIX}.layers.99999.self_attn.q_proj.lora_A.weight": "another base model",
    f"{PREFIX}.layers.0.self_attn.k_proj.lora_A.weight": "does not target this module",
    f"{PREFIX}.layers.0.self_attn.q_proj.lora_A.other.weight": "the same weight twice",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "the same weight twice",
    f"{PREFIX}.language_model.layers.0.self_attn.q_proj.lora_A.weight": "the same weight twice",
}


@pytest.mark.parametrize("name", UNEXPECTED)
def test_unexpected_tensor_is_refused(tmp_path, geometry, name) -> None:
    directory = write_peft(tmp_path / "adapter", random_adapter(geometry, 4, targets=["q", "v", "down"]))
    edit_tensors(directory, lambda t: t.update({name: np.zeros((4, 24), np.float32)}))
    message = refusal(directory, geometry)
    assert repr(name) in message and UNEXPECTED[name] in message


def test_layers_of_two_modules_are_refused(directory, geometry) -> None:
    other = Q0_A.replace("model.layers", "model.language_model.layers")
    edit_tensors(directory, lambda t: t.update({other: t.pop(Q0_A)}))
    message = refusal(directory, geometry)
    assert repr(other) in message and "different modules" in message


def test_first_of_many_unexpected_tensors_are_named(directory, geometry) -> None:
    write_header(directory, {f"t{n}": entry([0], 0, 0) for n in range(30_000)})
    assert "unexpected tensor 't0' (and 29999 more: 't1', 't2', ...)" in refusal(directory, geometry)


@pytest.mark.parametrize("part", ["unknown", "adapter's name", "twice"])
def test_long_names_are_shortened_in_the_message(directory, geometry, part) -> None:
    header, body = header_of(directory)
    name = next(n for n in header if "lora_A" in n)
    long = {"unknown": "x" * 1_000_000, "adapter's name": name.replace(".weight", f".{'x' * 1_000_000}.weight")}
    if part == "twice":
        header[long["adapter's name"]] = entry([0], len(body), len(body))
    else:
        header[long[part]] = header.pop(name)
        header[long[part]] |= {"shape": [3, 24]} if part != "unknown" else {}
    write_header(directory, header, body)
    refusal(directory, geometry)


def test_rank_is_checked_before_weights_are_read(geometry, tmp_path, monkeypatch) -> None:
    """Against the kernels' bound in the config, against the store's bounds in the header."""
    directory = write_peft(tmp_path / "a", random_adapter(geometry, 200))
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("weights were read"))
    for settings, reason in (
        ({"max_lora_rank": 64}, "has rank 200 but max_lora_rank is 64"),
        ({"max_pages": 10}, "pages but the pool has 10"),
        ({"host_adapter_bytes": 1000}, "host_adapter_bytes is 1000"),
    ):
        with AdapterStore(geometry, "float32", **({"host_adapter_bytes": 10**9} | settings)) as store:
            with pytest.raises(AdapterError, match=reason):
                store.prepare("x", directory)
            assert store.tiers() == {}
    for fields in ({"r": 257}, {"r": 10**9}, {"r": 0}, {"rank_pattern": {"q_proj": 10**6}}):
        edit_config(directory, **fields)
        assert "rank must be an integer in 1..256" in refusal(directory, geometry)


def test_usual_expressions_of_a_large_model_stay_below_the_time_bound() -> None:
    """126 layers with a rank and an alpha for each module, and an expression that trainers write."""
    from slora_jax.adapters.targets import resolve_targets

    names = [f"layers.{layer}.self_attn.{p}_proj" for layer in range(126) for p in "qkvo"]
    target = r"(?:.*?(?:text|language).*?)?(?:.*?(?:self_attn|attention|attn|mlp|feed_forward).*?)?(?:q|k|v|o)_proj.*"
    data = {"peft_type": "LORA", "target_modules": f".*{target}"}
    data |= {"rank_pattern": dict.fromkeys(names, 4), "alpha_pattern": dict.fromkeys(names, 8)}
    targets = resolve_targets(LoraConfig.from_json(data), 126)
    assert len(targets) == 126 * 4 and {target.rank for target in targets.values()} == {4}
