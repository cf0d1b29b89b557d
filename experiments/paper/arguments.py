"""The arguments of each published run: pool tokens, batch limits, memory shares.

From the repository's command files (`exp_cmds*.sh`), where the authors lowered `--num-token` by hand until the run no
longer ran out of memory. Where several values follow each other in a file, a value holds from the number of adapters
(or the request rate) noted beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.paper.results import PaperRow

Steps = tuple[tuple[float, int], ...]
"""((from this number of adapters on, --num-token), ...), ascending."""

_POOL_TOKENS: dict[tuple[str, str], int] = {
    ("a10g", "S1"): 14_500,
    ("a10g", "S2"): 14_500,
    ("a100-40", "S2"): 14_500,  # clustering ablation
    ("a100-40", "S4"): 14_000,
    ("a100-80", "S1"): 125_000,
    ("a100-80", "S2"): 125_000,
    ("a100-80", "S4"): 65_000,
}

_LOWERED: dict[tuple[str, str, str], Steps] = {
    ("no-unify-mem", "a10g", "S1"): ((0, 13_500),),
    ("no-unify-mem", "a10g", "S2"): ((0, 13_500), (20, 10_000), (50, 9_000)),
    ("no-unify-mem", "a100-40", "S4"): ((0, 14_000), (20, 9_000)),
    ("no-unify-mem", "a100-80", "S2"): ((0, 125_000), (50, 110_000), (100, 100_000), (200, 90_000)),
    ("no-unify-mem", "a100-80", "S4"): ((0, 65_000), (100, 40_000), (400, 35_000)),
    ("bmm", "a10g", "S1"): ((0, 14_500), (20, 12_000)),
    ("bmm", "a10g", "S2"): ((0, 13_000), (20, 8_000)),
    ("bmm", "a100-40", "S4"): ((0, 14_000), (20, 7_000)),
    ("bmm", "a100-80", "S2"): ((0, 125_000), (20, 70_000)),
    ("bmm", "a100-80", "S4"): ((0, 65_000), (100, 35_000)),
}

_BY_FILE: dict[str, Steps] = {
    "ablation_mem/ablation_mem_a10g_S1_no_mem.jsonl": ((0, 14_500), (50, 13_500)),
    "ablation_mem/ablation_mem_a10g_S2_no_mem.jsonl": (
        (0, 14_500),
        (10, 13_500),
        (25, 10_000),
        (50, 9_500),
        (200, 9_000),
    ),
    "ablation_mem/ablation_bmm_a10g_S2_no_mem.jsonl": ((0, 13_000), (10, 9_000), (25, 7_000)),
}

_REAL: dict[str, Steps] = {"slora": ((0, 14_500),), "no-unify-mem": ((0, 11_000), (2, 10_000)), "bmm": ((0, 6_000),)}
"""The real workload on the A10G, by request rate."""

_CLUSTERING_TOKENS = 14_500
_PEFT_BATCH = {
    ("a10g", "S1"): 6,
    ("a10g", "S2"): 6,
    ("a100-80", "S1"): 50,
    ("a100-80", "S2"): 50,
    ("a100-80", "S4"): 35,
}


@dataclass(frozen=True)
class RowArguments:
    """The arguments of a run; None where the system has no such argument.

    Attributes:
      num_token: slots of the pool, for KV and (where unified) adapters.
      batch_max_tokens: prompt tokens of one prefill.
      replicas, memory_share: processes of vllm-packed, and the share of the device's memory of each.
      max_batch: requests of one batch of PEFT.
    """

    num_token: int | None = None
    batch_max_tokens: int | None = None
    replicas: int | None = None
    memory_share: float | None = None
    max_batch: int | None = None


def row_arguments(row: PaperRow) -> RowArguments:
    """Returns the arguments of a published run.

    Raises:
      KeyError: the paper never ran its system on this device and setting.
    """
    if row.system == "peft":
        return RowArguments(max_batch=_PEFT_BATCH[row.device, row.setting])
    if row.system == "vllm-packed":
        return _packed(row)
    num_token = _num_token(row)
    return RowArguments(num_token=num_token, batch_max_tokens=max(num_token // 6, 3072))


def pool_tokens(device: str, setting: str) -> int:
    """Returns `--num-token` of S-LoRA's own runs.

    Raises:
      KeyError: the paper never ran it on this device and setting.
    """
    return _POOL_TOKENS[device, setting]


def _num_token(row: PaperRow) -> int:
    if row.workload == "real":
        return _at(_REAL[row.system], row.rate)
    assert row.num_adapters is not None
    if row.file in _BY_FILE:
        return _at(_BY_FILE[row.file], row.num_adapters)
    if row.system == "clustering":
        return _CLUSTERING_TOKENS
    if steps := _LOWERED.get((row.system, row.device, row.setting)):
        return _at(steps, row.num_adapters)
    return _POOL_TOKENS[row.device, row.setting]


def _packed(row: PaperRow) -> RowArguments:
    """One process per adapter, equal shares. The committed command for S3 starts three and drives two; three processes
    of the 13B model leave no room for KV, so the run that was published must have had two."""
    assert row.num_adapters is not None
    replicas = row.num_adapters
    return RowArguments(replicas=replicas, memory_share=(0.95 if replicas <= 2 else 0.92) / replicas)


def _at(steps: Steps, value: float) -> int:
    return [tokens for start, tokens in steps if value >= start][-1]
