"""Reads `quantization_config` of a `config.json`: how a checkpoint's kernels are packed, and in which format they are
served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slora_jax.models.config_fields import INACTIVE
from slora_jax.models.fields import refused
from slora_jax.models.traits import INT4_GROUP, WeightFormat

Packing = Literal["packed", "int", "float", "fp8", "gptq", "awq", "nf4"]

_FIELD = "quantization_config"
# fmt: off
_KNOWN = {
    "compressed-tensors": {
        "config_groups", "format", "global_compression_ratio", "ignore", "kv_cache_scheme", "quantization_status",
        "sparsity_config", "version",
    },
    "fp8": {"activation_scheme", "fmt", "ignored_layers", "modules_to_not_convert", "weight_block_size"},
    "gptq": {
        "backend", "batch_size", "bits", "block_name_to_quantize", "cache_block_outputs", "checkpoint_format",
        "damp_percent", "dataset", "desc_act", "exllama_config", "group_size", "lm_head", "max_input_length", "meta",
        "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
        "modules_in_block_to_quantize", "pad_token_id", "static_groups", "sym", "tokenizer", "true_sequential",
        "use_cuda_fp16", "use_exllama",
    },
    "awq": {
        "backend", "bits", "do_fuse", "exllama_config", "fuse_max_seq_len", "group_size", "modules_to_fuse",
        "modules_to_not_convert", "version", "zero_point",
    },
    "bitsandbytes": {
        "_load_in_4bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant", "llm_int8_skip_modules", "llm_int8_threshold", "load_in_4bit",
    },
    "weights": {
        "actorder", "block_structure", "dynamic", "group_size", "num_bits", "observer", "observer_kwargs",
        "scale_dtype", "strategy", "symmetric", "type", "zp_dtype",
    },
    "group": {"format", "input_activations", "output_activations", "targets", "weights"},
}
# fmt: on
"""Fields that are read, or that tell how the checkpoint was made, by method and part."""


@dataclass(frozen=True)
class CheckpointFormat:
    """How the kernels of a quantised checkpoint are stored.

    Attributes:
      method: `quant_method`.
      packing: the layout of their tensors: compressed-tensors' "packed", "int" and "float", or another tool's.
      bits: of a code.
      group: inputs that share a scale; 0: all.
      block: outputs that share a scale ("float" and "fp8").
      weights: the format in which they are served, unless the engine's settings name another.
      is_kept: whether that format holds the codes and scales as they are.
      activations: how the checkpoint's activations are quantised, which are not here; "": they are not.
      is_reordered: whether inputs may be in another order than their groups (`desc_act`), as tensors `g_idx` say.
    """

    method: str
    packing: Packing
    bits: int
    group: int
    block: int
    weights: WeightFormat
    is_kept: bool
    activations: str = ""
    is_reordered: bool = False


def checkpoint_format(hf_config: Mapping[str, Any]) -> CheckpointFormat | None:
    """Returns the format of a checkpoint's kernels; None: they are not quantised.

    Raises:
      UnsupportedModelError: names the field, its value, and the supported values.
    """
    given = hf_config.get(_FIELD)
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise refused(_FIELD, given, "a dictionary")
    readers = {
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "gptq": _gptq,
        "awq": _awq,
        "bitsandbytes": _bitsandbytes,
    }
    method = given.get("quant_method")
    if method not in readers:
        raise refused(f"{_FIELD}.quant_method", method, " or ".join(map(repr, readers)))
    _require_known(given, method, _FIELD)
    return readers[method](given)


def _require_known(given: Mapping[str, Any], part: str, where: str) -> None:
    """Raises for a field that is not known and not switched off."""
    for field in given.keys() - _KNOWN[part] - {"quant_method"}:
        if given[field] not in INACTIVE:
            raise refused(f"{where}.{field}", given[field], "null, false, 0 or empty")


def _require(given: Mapping[str, Any], field: str, allowed: tuple[Any, ...], where: str = _FIELD) -> Any:
    """Returns the field's value, which must be one of `allowed`; a missing field is None."""
    value = given.get(field)
    if value not in allowed or (isinstance(value, bool) and True not in allowed and False not in allowed):
        raise refused(f"{where}.{field}", value, " or ".join(map(repr, allowed)))
    return value


def _compressed_tensors(given: Mapping[str, Any]) -> CheckpointFormat:
    layout = _require(given, "format", ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized"))
    sparsity = given.get("sparsity_config") or {}
    if sparsity.get("format") not in (None, "dense"):
        raise refused(f"{_FIELD}.sparsity_config.format", sparsity["format"], "'dense'")
    if given.get("kv_cache_scheme") is not None:
        raise refused(f"{_FIELD}.kv_cache_scheme", given["kv_cache_scheme"], "null; see EngineConfig.kv_dtype")
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise refused(f"{_FIELD}.config_groups", groups, "one group, for all linear layers")
    ((name, group),) = groups.items()
    where = f"{_FIELD}.config_groups.{name}"
    if group.get("targets") != ["Linear"]:
        raise refused(f"{where}.targets", group.get("targets"), '["Linear"]')
    if group.get("format") not in (None, layout):
        raise refused(f"{where}.format", group["format"], repr(layout))
    _require(group, "output_activations", (None,), where)
    _require_known(group, "group", where)
    weights, where = group.get("weights") or {}, f"{where}.weights"
    _require_known(weights, "weights", where)
    kind = _require(weights, "type", ("int", "float"), where)
    bits = _require(weights, "num_bits", (8,) if kind == "float" or layout != "pack-quantized" else (4, 8), where)
    _require(weights, "symmetric", (True,), where)
    _require(weights, "dynamic", (None, False), where)
    _require(weights, "actorder", (None, False, "static", "weight"), where)
    strategy = _require(weights, "strategy", ("tensor", "channel", "group", "block"), where)
    if (strategy == "block") and kind != "float":
        raise refused(f"{where}.strategy", strategy, "'tensor', 'channel' or 'group' for integers")
    size, block = 0, 0
    if strategy == "group":
        size = _positive(weights, "group_size", where)
    elif strategy == "block":
        block, size = _pair(weights.get("block_structure"), f"{where}.block_structure")
    activations = ""
    if inputs := group.get("input_activations"):
        if kind == "int":  # weights and activations of this scheme are scaled for each other
            raise refused(
                f"{_FIELD}.config_groups.{name}.input_activations",
                inputs,
                "null, because only weights are quantised here; use a W8A16, a W4A16 or the unquantised checkpoint",
            )
        activations = f"{inputs.get('type')}{inputs.get('num_bits')}"
    if kind == "float":
        return CheckpointFormat(
            "compressed-tensors", "float", 8, size, block, "fp8", not size and not block, activations
        )
    packing: Packing = "packed" if layout == "pack-quantized" else "int"
    if bits == 4 and (size in (0, INT4_GROUP) or size % INT4_GROUP == 0):
        return CheckpointFormat("compressed-tensors", packing, 4, size, 0, "int4", True)
    return CheckpointFormat("compressed-tensors", packing, bits, size, 0, "int8", bits == 8 and size == 0)


def _fp8(given: Mapping[str, Any]) -> CheckpointFormat:
    _require(given, "fmt", (None, "e4m3"))
    scheme = _require(given, "activation_scheme", (None, "dynamic", "static"))
    block, size = 0, 0
    if given.get("weight_block_size") is not None:
        block, size = _pair(given["weight_block_size"], f"{_FIELD}.weight_block_size")
    packing: Packing = "fp8" if size else "float"
    return CheckpointFormat("fp8", packing, 8, size, block, "fp8", not size, f"fp8, {scheme or 'dynamic'}")


def _gptq(given: Mapping[str, Any]) -> CheckpointFormat:
    bits = _require(given, "bits", (4, 8))
    _require(given, "checkpoint_format", (None, "gptq", "gptq_v2"))
    size = given.get("group_size")
    return CheckpointFormat(
        "gptq_v2" if given.get("checkpoint_format") == "gptq_v2" else "gptq",
        "gptq",
        bits,
        0 if size == -1 else _positive(given, "group_size"),
        0,
        "int8",
        False,
        is_reordered=_require(given, "desc_act", (None, False, True)) is True,
    )


def _awq(given: Mapping[str, Any]) -> CheckpointFormat:
    version = given.get("version")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise refused(f"{_FIELD}.version", version, "'gemm'")
    bits = _require(given, "bits", (4,))
    size = given.get("group_size")
    return CheckpointFormat("awq", "awq", bits, 0 if size == -1 else _positive(given, "group_size"), 0, "int8", False)


def _bitsandbytes(given: Mapping[str, Any]) -> CheckpointFormat:
    if not given.get("load_in_4bit", given.get("_load_in_4bit")):
        raise refused(f"{_FIELD}.load_in_4bit", given.get("load_in_4bit"), "true")
    _require(given, "bnb_4bit_quant_type", ("nf4",))
    _require(given, "bnb_4bit_quant_storage", (None, "uint8"))
    return CheckpointFormat("bitsandbytes", "nf4", 4, 0, 0, "int8", False)


def _positive(given: Mapping[str, Any], field: str, where: str = _FIELD) -> int:
    value = given.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refused(f"{where}.{field}", value, "a positive integer")
    return value


def _pair(value: Any, name: str) -> tuple[int, int]:
    """Reads the outputs and the inputs of a block."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise refused(name, value, "two positive integers")
    return value[0], value[1]
