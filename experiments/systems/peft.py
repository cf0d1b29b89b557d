"""The PEFT library as a server: driven as by the paper's script, and in its mixed-batch mode.

The script (`benchmarks/run_exp_peft.py`) sweeps: it takes all requests that have arrived, groups them by adapter, and
runs each group in batches of at most k, one after the other, before the next sweep. A batch is padded to its longest
prompt; finished rows are dropped; no request joins a running batch. k was 6 on an A10G, 50 (7B) and 35 (13B) on an
A100.
Two differences from the script: adapters have their own weights, loaded before the clock starts (the script makes a
random adapter for every group), and prompts of different lengths are padded on the left and masked.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.systems.serving import Done, Run
from experiments.workloads.requests import WorkloadRequest
from slora_jax import ConfigError
from slora_jax.metrics import RequestRecord
from slora_jax.scheduling import FinishReason
from slora_jax.simulation import Arrivals

NAP = 0.01
"""Seconds between looks at the clock while no request has arrived."""


def write_random_checkpoint(config_file: Path, directory: Path, seed: int) -> Path:
    """Writes a random Hugging Face checkpoint of a config.json's shape, made by transformers. Returns its directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**json.loads(config_file.read_text()))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


class PeftModel:
    """A checkpoint and its adapters in PEFT, on the CPU (or the first GPU), with greedy decoding."""

    def __init__(self, model_dir: Path, adapters: Mapping[str, Path], dtype: str = "float32") -> None:
        """Loads the checkpoint and the adapters (PEFT directories by name).

        Raises:
          ConfigError: torch or peft is not installed, or there is no adapter.
        """
        try:
            import peft
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise ConfigError(f"the system 'peft' needs {error.name}: make install EXTRAS=parity") from error
        if not adapters:
            raise ConfigError("peft: adapters={}: PEFT needs one at least")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        base = base.to(self._device)
        names = iter(adapters)
        first = next(names)
        self.model = peft.PeftModel.from_pretrained(base, str(adapters[first]), adapter_name=first)
        for name in names:
            self.model.load_adapter(str(adapters[name]), adapter_name=name)
        self.model.eval()

    def decode(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[int], adapters: str | list[str | None] | None
    ) -> Iterator[dict[int, int]]:
        """Runs one batch: yields a token of every unfinished row, by the row's number, until row i has `outputs[i]`.

        Args:
          adapters: one for all rows (None: the base model), or a list with the adapter of each row.
        """
        torch = self._torch
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = (torch.tensor(rows, device=self._device) for rows in (padded, mask))
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        rows, cache, made = list(range(len(prompts))), None, 0
        with torch.inference_mode():
            while rows:
                out = self._forward(
                    [adapters[row] for row in rows] if isinstance(adapters, list) else adapters,
                    input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
                cache, made = out.past_key_values, made + 1
                tokens = out.logits[:, -1].argmax(-1)
                yield dict(zip(rows, tokens.tolist(), strict=True))
                keep = [i for i, row in enumerate(rows) if outputs[row] > made]
                if len(keep) < len(rows):
                    rows = [rows[i] for i in keep]
                    kept = torch.tensor(keep, device=self._device, dtype=torch.long)
                    cache.batch_select_indices(kept)
                    tokens, mask, position = tokens[kept], mask[kept], position[kept]
                ids = tokens[:, None]
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                position = position[:, -1:] + 1

    def _forward(self, adapters: str | list[str | None] | None, **inputs: Any) -> Any:
        if isinstance(adapters, list):
            return self.model(adapter_names=[name or "__base__" for name in adapters], **inputs)
        if adapters is None:
            with self.model.disable_adapter():
                return self.model(**inputs)
        self.model.set_adapter(adapters, inference_mode=True)
        return self.model(**inputs)


def sweep(arrived: Sequence[int], workload: Sequence[WorkloadRequest], most: int, mixed: bool) -> list[list[int]]:
    """Returns the batches, of at most `most` requests, in which the requests `arrived` (numbers, in order) are run: by
    adapter, in order of each adapter's first request, or mixed, in order of arrival."""
    groups: dict[str | None, list[int]] = {}
    for number in arrived:
        groups.setdefault(None if mixed else workload[number].adapter, []).append(number)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def serve_by_sweeps(model: PeftModel, workload: Sequence[WorkloadRequest], most: int, mixed: bool, done: Done) -> Run:
    """Runs the script's loop over a workload, in real time."""
    start = time.perf_counter()
    tokens: list[list[int]] = [[] for _ in workload]
    records: dict[int, RequestRecord] = {}
    arrivals = Arrivals(workload)
    while arrivals:
        arrived = dict(arrivals.until(time.perf_counter() - start))
        if not arrived:
            time.sleep(NAP)
        for batch in sweep(list(arrived), workload, most, mixed):
            requests = [workload[number] for number in batch]
            names = [request.adapter for request in requests]
            times: list[float] = [time.perf_counter()]
            for step in model.decode(
                [r.prompt for r in requests], [r.output for r in requests], names if mixed else names[0]
            ):
                times.append(time.perf_counter())
                for row, token in step.items():
                    number, request = batch[row], requests[row]
                    tokens[number].append(token)
                    if len(tokens[number]) == request.output:
                        records[number] = _record(number, request, start + arrived[number], times)
                        arrivals.ended(number, times[-1] - start)
                        done()
    return Run([records[number] for number in range(len(workload))], tokens)


def _record(number: int, request: WorkloadRequest, arrival: float, times: list[float]) -> RequestRecord:
    """times: of the batch's start and of each token, on the same clock as `arrival`."""
    return RequestRecord(
        request_id=f"{number}",
        adapter=request.adapter,
        prompt_tokens=len(request.prompt),
        output_tokens=request.output,
        finish_reason=FinishReason.LENGTH,
        arrival=arrival,
        finished=times[-1],
        admitted=times[0],
        first_token=times[1],
        token_times=tuple(times[1:]),
    )
