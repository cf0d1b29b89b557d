"""The paper's raw results, typed: every run of its repository's `benchmarks/paper` as one row of `results.csv`."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

RESULTS_FILE = Path(__file__).with_name("results.csv")

_FOLDERS = {
    "slora": "slora",
    "no_mem": "no-unify-mem",
    "bmm": "bmm",
    "vllm": "vllm-packed",
    "lifo": "lcfs",
    "abort": "abort",
    "pets": "pets",
}
"""Folder of a synthetic or real run -> system."""


@dataclass(frozen=True)
class PaperRow:
    """One published run. file: in the repository's `benchmarks/paper`. system: slora, no-unify-mem, bmm, vllm-packed,
    peft, merge, lcfs, abort, clustering, or pets. workload: "synthetic" or "real". rate: requests per second; duration:
    of the arrivals, seconds. num_adapters, alpha, cv: None for the real workload. cluster: the clustering's number of
    adapters, else None. Latencies in seconds; first_token_latency and latency are means over completed requests."""

    file: str
    system: str
    device: str
    setting: str
    workload: str
    num_adapters: int | None
    alpha: float | None
    rate: float
    cv: float | None
    duration: float
    input_range: tuple[int, int]
    output_range: tuple[int, int]
    cluster: int | None
    aborts: int
    total_time: float
    throughput: float
    latency: float
    first_token_latency: float
    satisfaction: float
    attainment: float

    @property
    def requests(self) -> int:
        return int(self.rate * self.duration)

    @property
    def label(self) -> str:
        """The run in a few words: unique but for repeated runs."""
        parts = [self.system, self.device, self.setting]
        if self.workload == "real":
            parts.append("real")
        else:
            parts.append(f"n={self.num_adapters}")
            parts += [f"alpha={self.alpha:g}"] if self.alpha != 1 else []
        parts.append(f"R={self.rate:g}")
        parts += [f"cv={self.cv:g}"] if self.cv not in (None, 1) else []
        parts += [f"D={self.duration:g}"] if self.duration != 300 else []
        parts += [f"d={self.cluster}"] if self.cluster is not None else []
        if (self.input_range, self.output_range) != ((8, 512), (8, 512)):
            parts.append(f"in<{self.input_range[1]} out<{self.output_range[1]}")
        return " ".join(parts)


def load_rows(file: Path = RESULTS_FILE) -> list[PaperRow]:
    """All rows in the file's order, the other scheduler's (pets) included.

    Raises:
      ValueError: a row whose file name is of no known kind.
    """
    with file.open() as table:
        return [_typed(row) for row in csv.DictReader(table)]


def _typed(row: dict[str, str]) -> PaperRow:
    system, device, setting, workload, cluster = _classify(row["file"])

    def number(key: str) -> float | None:
        return float(row[key]) if row[key] else None

    adapters = number("n")
    return PaperRow(
        file=row["file"],
        system=system,
        device=device,
        setting=setting,
        workload=workload,
        num_adapters=None if adapters is None else int(adapters),
        alpha=number("alpha"),
        rate=float(row["R"]),
        cv=number("cv"),
        duration=float(row["D"]),
        input_range=tuple(json.loads(row["in_range"])),
        output_range=tuple(json.loads(row["out_range"])),
        cluster=cluster,
        aborts=int(row["aborts"] or 0),
        total_time=float(row["total_time"]),
        throughput=float(row["throughput"]),
        latency=float(row["avg_latency"]),
        first_token_latency=float(row["avg_first_token_latency"]),
        satisfaction=float(row["satisfaction"]),
        attainment=float(row["attainment"]),
    )


def _classify(file: str) -> tuple[str, str, str, str, int | None]:
    """(system, device, setting, workload, cluster) of a result file."""
    folder, *_, name = file.split("/")
    if folder == "ablation_merge":
        # The commands were not kept. S-LoRA's rows gain from a second adapter, the more the more even alpha is: the
        # first one has the largest rank, which is so in S2 and not in S1.
        return ("merge" if name.endswith("_merge.jsonl") else "slora"), "a10g", "S2", "synthetic", None
    if match := re.fullmatch(r"ablation_cluster(?:_cv)?_size_(\d+)_a100_(S\d)\.jsonl", name):
        return "clustering", "a100-40", match[2], "synthetic", int(match[1])
    device = re.search(r"a10g|a100[-_][48]0", name)
    setting = re.search(r"_(S\d)_", name)
    if device is None or setting is None:
        raise ValueError(f"{file}: its name has no known device and setting")
    if folder == "peft":
        system = "peft"
    elif folder == "ablation_mem":
        system = "bmm" if "_bmm_" in name else "slora" if name.endswith("_dm.jsonl") else "no-unify-mem"
    elif folder in ("synthetic", "real"):
        system = _FOLDERS[file.split("/")[1]]
    else:
        raise ValueError(f"{file}: the folder {folder!r} is not known")
    return system, device[0].replace("_", "-"), setting[1], "real" if folder == "real" else "synthetic", None
