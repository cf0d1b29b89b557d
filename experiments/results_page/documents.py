"""The documents: docs/results.md, and the marked blocks of README.md and docs/quantisation.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.results_page import compiled, measured, paper, quantised
from experiments.results_page.section import ROOT, Section, of_first
from experiments.results_page.table import percent, pick, table

README, PAGE, QUANTISATION = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "quantisation.md"


SECTIONS: Mapping[str, Section] = {
    "vllm": Section("Against vLLM's LoRA", "make bench-vllm", ("vllm_comparison.json",), measured.vllm),
    "peft": Section(
        "Against Hugging Face PEFT", "make bench", ("measured/peft_comparison.jsonl",), measured.peft, of_first
    ),
    "mechanisms": Section(
        "Mechanisms on and off",
        "make bench MEASURED=mechanisms",
        ("measured/mechanisms.jsonl", "measured/mechanisms_simulated.jsonl"),
        measured.mechanisms,
        of_first,
    ),
    "serving": Section(
        "HTTP under load",
        "make bench MEASURED=serving_load",
        ("measured/serving_load.jsonl",),
        measured.serving,
        of_first,
    ),
    "serving_smollm2": Section(
        "HTTP under load, with SmolLM2",
        "make bench MEASURED=serving_smollm2",
        ("measured/serving_smollm2.jsonl",),
        measured.load,
        of_first,
    ),
    "server": Section(
        "Cost of a token in the server",
        "python -m experiments.server_bench --http-processes 0 1 --rounds 3 --output "
        "experiments/results/server_streams.json",
        ("server_streams.json",),
        measured.server,
    ),
    "replicas": Section(
        "Routing by adapter",
        "make bench MEASURED=replica_affinity",
        ("measured/replica_affinity.jsonl",),
        measured.replicas,
        of_first,
    ),
    "starts": Section(
        "Time to start", "python -m experiments.start_times --model MODEL", ("start_times.json",), measured.starts
    ),
    "memory": Section(
        "Memory of a process",
        "python -m experiments.memory_parts --model MODEL",
        ("memory_parts.json",),
        measured.memory,
    ),
    "quantisation": Section(
        "Quantised weights", "python -m experiments.quantisation", ("quantisation.json",), measured.quantisation
    ),
    "training": Section(
        "Training",
        "python -m experiments.training_bench",
        ("training.json",),
        measured.training,
        where=lambda data: data["cells"][-1]["provenance"],
    ),
    "publishing": Section(
        "Publishing trained weights",
        "python -m experiments.training_bench.publish",
        ("publish.json",),
        measured.publishing,
    ),
    "scheduler": Section(
        "Time to plan a step",
        "python -m experiments.scheduler_benchmark",
        ("scheduler_benchmark.json",),
        measured.scheduler,
    ),
    "miniature": Section(
        "The paper in miniature", "make miniature", ("miniature",), paper.miniature, where=paper.miniature_provenance
    ),
    "simulator": Section(
        "The simulator against the published runs",
        "python -m experiments.simulator_validation",
        ("simulator/validation.json",),
        paper.simulator,
    ),
    "compiled": Section(
        "Compiled for one GPU",
        "slora compile-report --model-config experiments/models/llama-3-8b.json --target h200 "
        "--max-num-batched-tokens 2048 --max-num-seqs 256 --json FILE",
        tuple(f"compile_reports/llama-3-8b_{target}.json" for target in ("h200", "a100", "l4")),
        compiled.programs,
        where=lambda report: {},
    ),
    "families": Section(
        "Other families, compiled for one GPU",
        "slora compile-report --model-config experiments/models/phi-4.json --target h200 "
        "--max-num-batched-tokens 2048 --max-num-seqs 256 --json FILE",
        tuple(f"compile_reports/{model}_h200.json" for model in ("phi-4", "gemma-3-12b", "qwen3-30b-a3b")),
        compiled.families,
        where=lambda report: {},
    ),
    "kernels": Section(
        "Compiled kernels",
        "python -m experiments.kernel_bench --compiled h200",
        ("compiled_kernels.json",),
        compiled.kernels,
        where=lambda rows: {},
    ),
    "predicted": Section(
        "Predicted times of kernels",
        "python -m experiments.kernel_bench --predict h200 --out FILE",
        ("predicted_h200.json",),
        compiled.predicted,
        where=lambda data: {},
    ),
    "parallel": Section(
        "Compiled for several GPUs",
        "python -m experiments.tp_compile_table --layers 2",
        ("compile_reports/tensor_parallel_h200.json",),
        compiled.parallel,
        where=lambda content: content,
    ),
}
"""In the order of the page. The documents have these commands from here alone."""


OTHER_COMMANDS = {
    "make bench MEASURED=baselines": "the paper's baselines side by side on a CPU",
    "python -m experiments.simulator_fit": "the simulator's efficiencies, fitted to the published runs",
    "python -m experiments.pool_picture": "[`pool.png`](pool.png)",
    "python -m experiments.run_trace": "[`trace.png`](trace.png), and a trace for Perfetto",
    "python -m experiments.live_page_picture": "[`live_page.png`](live_page.png)",
    "make paper": "the report on the paper's tables and figures, with [`figure_6.png`](figure_6.png)",
    "make bench-gpu": "every kernel on a GPU",
}
"""Commands whose output the page has no table of."""


INTRODUCTION = """<!-- Written by `make results`; do not edit. -->

# Results

Every table here comes from a JSON file in this repository: `make results` rewrites this page and the numbers in the
README. Nothing has been measured on a GPU yet; the sections on GPUs report what the compiler says."""


def results_page() -> str:
    """The text of docs/results.md."""
    anchors = {s.title: re.sub(r"[^\w -]", "", s.title.lower()).replace(" ", "-") for s in SECTIONS.values()}
    contents = "\n".join(f"- [{title}](#{anchor})" for title, anchor in anchors.items())
    sections = [section.markdown() for section in SECTIONS.values()]
    others = table("command | makes", [(f"`{command}`", makes) for command, makes in OTHER_COMMANDS.items()])
    return "\n\n".join([INTRODUCTION, contents, *sections, "## Other commands", others]) + "\n"


def result_rows() -> str:
    """The README's table."""
    (vllm,), (peft,), (mechanisms, _), (serving,), (simulator,) = (
        SECTIONS[name].content() for name in ("vllm", "peft", "mechanisms", "serving", "simulator")
    )
    phases, (few, many) = vllm["phases"], vllm["settings"]["many_adapters"]
    base, lora = (phases[name]["slora-jax over vllm"]["median_of_pairs"] for name in ("base", "lora"))
    (grouped_name, grouped), (_, mixed), *_ = measured.peft_ratios(peft).items()
    shifting = [line for line in mechanisms.values() if line["panel"] == "shifting" and "over" in line]
    splits = sorted(line["over"]["ratios"]["throughput"] for line in shifting)
    served = measured.find_line(serving, run__load_test__side="served")
    users, adapters = pick(served["run"], "client.users adapters.count")
    error, runs = pick(simulator["held_out_errors"]["slora"], "throughput.median rows")
    rows = {
        f"{vllm['settings']['adapters']} adapters of mixed rank, against vLLM's LoRA on a CPU": (
            "vllm",
            f"{lora:.1f} times vLLM's output tokens/s (without adapters {base:.2f} times)",
        ),
        f"{grouped_name.split(', ')[1]}, against Hugging Face PEFT": (
            "peft",
            f"{grouped:.1f} times PEFT's output tokens/s with an adapter per batch, {mixed:.1f} times in mixed batches",
        ),
        f"{many:,} adapters, against {few}": (
            "vllm",
            f"{phases['alone'][f'{many} adapters over {few}']['median_of_pairs']:.2f} of the output tokens/s",
        ),
        "Fixed split between adapters and KV cache, against one pool": (
            "mechanisms",
            f"{splits[0]:.2f} to {splits[-1]:.2f} of the requests/s when the load shifts",
        ),
        f"HTTP server with {users} streams over {adapters} adapters, against the engine alone": (
            "serving",
            f"{served['over']['ratios']['goodput']:.2f} of the output tokens/s",
        ),
        "Simulator, against the published S-LoRA runs": (
            "simulator",
            f"median throughput error {percent(error)} over {runs} held-out runs",
        ),
    }
    return table(
        "What was measured | Result | Command | Data",
        [[what, text, f"`{SECTIONS[s].command}`", SECTIONS[s].links("")] for what, (s, text) in rows.items()],
    )


def start_sentence() -> str:
    """The README's sentence on how long a start takes."""
    (data,) = SECTIONS["starts"].content()
    names = ("serve, first start", "serve, second start", "generate, first start")
    first, second, generate = (data["starts"][name]["here"]["answer_seconds"] for name in names)
    cores = data["provenance"]["machine"]["cores"]
    return (
        f"With SmolLM2 on a CPU with {cores} cores, the server is ready after {first:.0f} s the first time, when it "
        f"compiles its programs, and after {second:.0f} s later; `slora generate` answers after {generate:.0f} s."
    )


CAPACITY = Section(
    "Capacity and throughput, simulated",
    "python -m experiments.run experiments/configs/beyond/quantised.yaml "
    "--output experiments/results/simulator/quantised.jsonl",
    ("simulator/quantised.jsonl",),
    quantised.capacity,
    where=lambda lines: {},
)
COMET = Section("COMET's arithmetic", "python -m experiments.comet", ("comet.json",), quantised.comet)

BLOCKS: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    README: {"starts": start_sentence, "results": result_rows},
    QUANTISATION: {"capacity": CAPACITY.text, "comet": COMET.text},
}
"""The blocks of each document, each between `<!-- NAME -->` and `<!-- /NAME -->`."""


def with_blocks(document: Path) -> str:
    """Returns a document with its blocks renewed. Raises ValueError unless each block is there exactly once."""
    text = document.read_text()
    for name, made in BLOCKS[document].items():
        block = f"<!-- {name} -->\n{made()}\n<!-- /{name} -->"
        before, after = re.split(f"<!-- {name} -->\n.*?<!-- /{name} -->", text, flags=re.S)
        text = before + block + after
    return text


def documents() -> dict[Path, str]:
    """Returns the text that each document should have."""
    return {PAGE: results_page(), **{document: with_blocks(document) for document in BLOCKS}}
