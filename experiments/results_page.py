"""Writes docs/results.md and the marked blocks of README.md from the committed results: `make results`.

Every measured number in the documents comes from a JSON file in `experiments/results` through this module. `SECTIONS`
says for each section of the page which command measures it and which files hold the result. tests/test_documents.py
fails when a document is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from experiments.config import load_experiment
from experiments.report.collect import Collected, Curve, collect
from experiments.report.conclusions import CONCLUSIONS
from experiments.results_file import read_results
from experiments.rounds import ratios

EXPERIMENTS = Path(__file__).parent
ROOT = EXPERIMENTS.parent
RESULTS = EXPERIMENTS / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"

Json = dict[str, Any]
Lines = Mapping[str, Json]
"""Runs of `experiments.run` by their keys."""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
      command: measures it and writes `files`.
      files: paths in `experiments/results`; a directory stands for its JSONL files.
      body: returns the paragraphs and tables, given the content of each file.
      where: returns date, machine and versions, given the content of the first file; {} if it has none.
    """

    title: str
    command: str
    files: tuple[str, ...]
    body: Callable[..., Iterable[str]]
    where: Callable[[Any], Mapping[str, Any]] = lambda content: content["provenance"]

    def content(self) -> list[Any]:
        return [_read(RESULTS / name) for name in self.files]

    def links(self, folder: str) -> str:
        """Links to the files from a document in `folder` ("" or "../")."""
        return ", ".join(f"[`{Path(name).name}`]({folder}experiments/results/{name})" for name in self.files)

    def markdown(self) -> str:
        content = self.content()
        head = f"`{self.command}` writes {self.links('../')}."
        return "\n\n".join([f"## {self.title}", head, *_provenance(self.where(content[0])), *self.body(*content)])


def _read(path: Path) -> Any:
    if path.is_dir():
        return {file.stem: read_results(file) for file in sorted(path.glob("*.jsonl"))}
    return read_results(path) if path.suffix == ".jsonl" else json.loads(path.read_text())


def _of_first(lines: Lines) -> Json:
    return next(iter(lines.values()))


def _provenance(found: Mapping[str, Any]) -> Iterable[str]:
    """Date, machine, versions and revision in one line."""
    if found:
        versions = {"Python": found["python"], **found["versions"]}
        for worker in found.get("workers", {}).values():
            versions |= {name: version for name, version in worker.items() if name not in ("python", *versions)}
        cpu, cores, memory, system = _pick(found["machine"], "cpu cores memory_gib system")
        yield (
            f"{found['date']}; {cpu}, {cores} cores, {memory} GiB, {system}; "
            f"{', '.join(f'{name} {version}' for name, version in versions.items())}; revision {found['git']}."
        )


def _pick(values: Any, names: str) -> list[Any]:
    """Fields by their dotted names, which `names` separates by spaces."""
    return [reduce(lambda at, name: at[name], path.split("."), values) for path in names.split()]


def _table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    """header: the columns' titles, separated by " | "."""
    lines = [header, " | ".join("---" for _ in header.split("|")), *(" | ".join(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    """Three significant digits."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        case int():
            return f"{value:,}"
    return str(value)


def _percent(value: float | None) -> str:
    """Two significant digits."""
    return "" if value is None else f"{100 * value:.2g}%"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


# Sections


def _vllm(data: Json) -> Iterable[str]:
    settings, alone = data["settings"], data["phases"]["alone"]
    layers, width = _pick(settings, "model.random.layers model.random.hidden")
    yield (
        f"Output tokens per second in float32: a random Llama of {layers} layers and width {width}, "
        f"{settings['requests']} requests of {settings['prompt_low']} to {settings['prompt_high']} prompt tokens and "
        f"{settings['output']} new tokens, adapters of rank {_listed(settings['ranks'])} on q, k, v and o. Medians. "
        "*Ratio* is the median over rounds in which the two systems ran one after the other."
    )
    rows = []
    for name, adapters in (("base", "none"), ("lora", settings["adapters"])):
        phase = data["phases"][name]
        medians = _pick(phase, "slora-jax.tokens_per_second.median vllm.tokens_per_second.median")
        equal, requests = _pick(phase["requests_with_equal_tokens"], "equal of")
        ratio, rounds = phase["slora-jax over vllm"]["median_of_pairs"], len(phase["vllm"]["seconds"])
        rows.append([adapters, *medians, ratio, f"{equal} of {requests}", rounds])
    yield _table("adapters | slora-jax | vLLM | ratio | requests with equal tokens | rounds", rows)
    few, many = settings["many_adapters"]
    yield (
        f"slora-jax alone. {few} and {many:,} adapters have rank {settings['many_rank']} and "
        f"{settings['many_requests']} requests:"
    )
    rates = {name: run["tokens_per_second"]["median"] for name, run in alone.items() if "tokens_per_second" in run}
    ratios = {name: run["median_of_pairs"] for name, run in alone.items() if "median_of_pairs" in run}
    yield _table(
        "adapters | tokens per second", [["none", rates.pop("base")], *((int(n), rate) for n, rate in rates.items())]
    )
    yield _table("ratio, median over rounds | ", ratios.items())


def _line(lines: Lines, **wanted: Any) -> Json:
    """Returns the line of the run with these fields, whose dots are underlines twice: `system__name="slora"`."""
    for line in lines.values():
        if all(_pick(line, name.replace("__", "."))[0] == value for name, value in wanted.items()):
            return line
    raise ValueError(f"no line has {wanted}")


def _ratio(one: Json, other: Json, metric: str) -> float:
    """Returns the median over the rounds of a metric over the other run's."""
    return ratios(one["rounds"], other["rounds"])[metric]


def _peft_ratios(lines: Lines) -> dict[str, float]:
    """Returns the ratios of the comparison with PEFT, by their description."""
    beside = [line for line in lines.values() if line["panel"] == "beside PEFT"]
    counts = sorted({line["run"]["adapters"]["count"] for line in beside})
    runs = {(*_pick(line["run"], "system.name adapters.count"),): line for line in beside}
    many = {line["run"]["workload"]["parameters"]["used"]: line for line in lines.values() if line not in beside}
    found = {
        f"slora over {name}, {counts[-1]} adapters": (runs["slora", counts[-1]], runs[system, counts[-1]])
        for name, system in (("peft-grouped", "peft"), ("peft-mixed", "peft-mixed"))
    }
    found[f"{max(many)} adapters over {min(many)}"] = (many[max(many)], many[min(many)])
    found |= {f"{n} adapters over base only": (runs["slora", n], runs["slora", 0]) for n in counts[1:]}
    return {name: _ratio(*pair, "token_throughput") for name, pair in found.items()}


def _peft(lines: Lines) -> Iterable[str]:
    beside = [line for line in lines.values() if line["panel"] == "beside PEFT"]
    first, many = beside[0]["run"], [line["run"] for line in lines.values() if line not in beside]
    model = json.loads((EXPERIMENTS / "models" / f"{first['model']}.json").read_text())
    layers, width = _pick(model, "num_hidden_layers hidden_size")
    requests, (low, high), (output, _) = _pick(
        first, "workload.parameters.requests workload.parameters.input_range workload.parameters.output_range"
    )
    peft = [line for line in beside if line["run"]["system"]["name"] != "slora"]
    same = sorted({f"{line['same_tokens'][0]} of {line['same_tokens'][1]}" for line in peft})
    yield (
        f"Output tokens per second in float32: a random Llama of {layers} layers and width {width}, adapters of rank "
        f"{_listed(first['adapters']['ranks'])} on q, k, v and o, {requests} requests of {low} to {high - 1} prompt "
        f"tokens and {output} new tokens, all submitted at the start. Medians of {first['measured']['rounds']} rounds, "
        "in each of which every system runs once. Requests with the same tokens as PEFT's, in every pairing: "
        f"{_listed(same)}."
    )
    rates = {(*_pick(line["run"], "system.name adapters.count"),): line["metrics"] for line in beside}
    yield _table(
        "adapters | slora-jax | PEFT, grouped by adapter | PEFT, mixed batch",
        [
            [n or "base", *(rates.get((s, n), {}).get("token_throughput") for s in ("slora", "peft", "peft-mixed"))]
            for n in sorted({adapters for _, adapters in rates})
        ],
    )
    yield _table("ratio, median over rounds | ", _peft_ratios(lines).items())
    few, most = sorted(run["workload"]["parameters"]["used"] for run in many)
    yield (
        "*Grouped by adapter* drives PEFT as the paper did; *mixed batch* is PEFT's own way to mix adapters. The "
        f"comparison of {most:,} adapters with {few} takes {many[0]['workload']['parameters']['requests']} requests; "
        f"the pool has room for all {few} and for a fraction of the {most:,}."
    )


MECHANISM_FIELDS = ("throughput", "first_token_latency", "cold_first_token_latency", "preemptions", "adapter_loads")
MECHANISM_COLUMNS = (
    "setting | relative | requests/s | first token, mean (s) | of rarely used adapters | preemptions | adapter loads"
)


def _mechanisms(lines: Lines, simulated: Lines) -> Iterable[str]:
    rounds, disk = _pick(next(iter(lines.values()))["run"], "measured.rounds measured.disk_seconds")
    same = all(line["same_tokens"][0] == line["same_tokens"][1] for line in lines.values() if "over" in line)
    yield (
        "Each mechanism on and off. The engines of a table differ in one setting and serve the same requests; medians "
        f"of {rounds} rounds. *Relative* is the median over rounds of the requests per second, divided by those of the "
        f"first row. A read from the slow disk takes {1000 * disk:.0f} ms."
        + (" All engines of a table returned the same tokens." if same else "")
    )
    rows = []
    for line in lines.values():
        relative = line["over"]["ratios"]["throughput"] if "over" in line else 1.0
        figures = [line["metrics"].get(field) for field in MECHANISM_FIELDS]
        rows.append([*_pick(line, "panel curve"), relative, *figures])
    yield _table(f"load | {MECHANISM_COLUMNS}", rows)
    yield "### The same in the simulator"
    rows = []
    for panel in _collected("beyond", "mechanisms", simulated).panels:
        points = [(curve.name, point) for curve in panel.curves for point in curve.points]
        first = points[0][1].metrics["throughput"]
        for name, point in points:
            figures = [point.ours(field) for field in MECHANISM_FIELDS]
            rows.append([panel.title, name, point.metrics["throughput"] / first, *figures])
    yield _table(f"device, workload and mechanism | {MECHANISM_COLUMNS}", rows)


def _serving(lines: Lines) -> Iterable[str]:
    sides = (_line(lines, run__load_test__side=side) for side in ("alone", "served", "soak"))
    alone, served, soak = sides
    run, grown = served["run"], soak["metrics"]
    users, adapters, ranks, requests, tokens = _pick(
        run, "client.users adapters.count adapters.ranks workload.parameters.requests system.settings.num_tokens"
    )
    yield (
        f"{users} concurrent streams over {adapters} adapters of rank {_listed(ranks)}, {requests} requests a round, a "
        f"pool of {tokens:,} tokens, client and server on one machine. *Engine* runs the same requests without HTTP. "
        "Output tokens per second:"
    )
    rounds = []
    for number, (one, other) in enumerate(zip(alone["rounds"], served["rounds"], strict=True), 1):
        rounds.append([number, one["goodput"], other["goodput"], other["goodput"] / one["goodput"], other["failed"]])
    medians = [line["metrics"]["goodput"] for line in (alone, served)]
    rounds.append(["median", *medians, served["over"]["ratios"]["goodput"], None])
    yield _table("round | engine | over HTTP | ratio | failures", rounds)
    yield "Requests over HTTP with the engine's tokens: {} of {}.".format(*served["same_tokens"])
    cpu = {name: served["metrics"][f"cpu_microseconds_per_token_of_{name}"] for name in ("main_thread", "client")}
    engines = [line["metrics"]["cpu_microseconds_per_token_of_engine"] for line in (served, alone)]
    costs = {
        "event loop": cpu["main_thread"],
        "client": cpu["client"],
        "server process, over the engine alone": engines[0] - engines[1],
    }
    yield _table("CPU time per token, median | microseconds", costs.items())
    first, last, most = (grown[f"rss_mib_{at}"] for at in ("first", "last", "most"))
    yield (
        f"A soak of {grown['seconds']:.0f} s, {grown['requests']:,} requests: {grown['failed']} failures, "
        f"{grown['pages_lost']} pages lost; {first:,.0f} MiB resident after warm-up, {last:,.0f} at the end, "
        f"{most:,.0f} at most."
    )


def _replicas(lines: Lines) -> Iterable[str]:
    count, adapters = _pick(next(iter(lines.values())), "run.replicas.count run.adapters.count")
    held = max(number for line in lines.values() for one in line["details"] for number in one["resident_adapters"])
    yield (
        f"Share of requests that found their adapter in the pool: {count} replicas, each with room for {held} of "
        f"{adapters} adapters. *Ideal* is the best possible share."
    )
    panels: dict[str, list[Json]] = {}
    for line in lines.values():
        panels.setdefault(line["panel"], []).append(line)
    routes = [line["curve"] for line in next(iter(panels.values()))]
    shares = [
        [title, *(line["metrics"]["resident_share"] for line in group), group[0]["metrics"]["resident_share_ideal"]]
        for title, group in panels.items()
    ]
    fields = "panel curve metrics.throughput metrics.latency_p50 metrics.latency_p99 metrics.adapter_loads"
    rows = [_pick(line, fields) for line in lines.values()]
    yield _table(f"popularity of adapters | routed by {' | '.join(routes)} | ideal", shares)
    yield _table("popularity of adapters | routed by | requests/s | latency p50 (s) | p99 (s) | adapter loads", rows)


def _starts(data: Json) -> Iterable[str]:
    yield (
        "Seconds from the command line to the first output, or for `slora serve` to `/ready`. SmolLM2 (135M "
        f"parameters, float32), one start each, beside revision {data['beside']}. A first start has an empty cache of "
        "compiled programs."
    )
    fields = "here.answer_seconds here.peak_mib beside.answer_seconds beside.peak_mib"
    yield _table(
        "start | seconds | peak MiB | seconds before | peak MiB before",
        [[name, *_pick(start, fields)] for name, start in data["starts"].items()],
    )


def _memory(data: Json) -> Iterable[str]:
    yield f"Resident memory of one process after each phase of a start, `{data['model']}` in float32."
    rows = [[name, *_pick(size, "resident anonymous")] for name, size in data["mib_after"].items()]
    yield _table("after | resident MiB | anonymous MiB", rows)
    arrays = _listed(f"{name} {size:,.0f} MiB" for name, size in data["mib_by_shape"].items())
    yield f"Arrays, by their shapes: {arrays}. {data['programs_compiled']} programs were compiled."


def _scheduler(data: Json) -> Iterable[str]:
    yield (
        f"Host time to plan one step, prefetch included, in milliseconds of CPU time: {data['running']:,} running and "
        f"{data['waiting']:,} waiting requests over {data['adapters']} adapters."
    )
    fields = "1x.schedule_ms 1x.schedule_p10_ms 1x.schedule_p95_ms 2x.schedule_ms ratio_at_twice_the_size"
    yield _table(
        "policy | median | p10 | p95 | with twice the requests | ratio",
        [[name, *_pick(case, fields)] for name, case in data["cases"].items()],
    )


def _collected(folder: str, name: str, lines: Mapping[str, Any] | None = None) -> Collected:
    """An experiment with its results; without lines, with the paper's published values alone."""
    experiment = load_experiment(EXPERIMENTS / "configs" / folder / f"{name}.yaml")
    return collect(experiment, lines or {run.config.key: {"metrics": {}} for run in experiment.runs})


def _miniature(results: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    yield (
        "The paper's figures on the real engine, with a small model on a CPU. `make paper` writes the published and "
        "the simulated figures."
    )
    names = sorted(results, key=lambda name: (len(name), name))  # figure_5 before figure_10
    engine = {name: _collected("miniature", name, results[name]) for name in names}
    yield "### The paper's conclusions"
    rows = []
    for one in CONCLUSIONS:
        published = one.verdict(_collected("paper", one.experiment), "published")
        measured = one.verdict(engine[one.experiment], "ours")
        assert published is not None and measured is not None
        rows.append([one.sentence, one.experiment, published.holds, measured.holds, "; ".join(measured.numbers)])
    yield _table("conclusion | experiment | holds as published | holds on the engine | engine's numbers", rows)
    for collected in engine.values():
        experiment = collected.experiment
        yield f"### {experiment.title}"
        yield experiment.about
        for panel in collected.panels:
            yield f"{panel.title}, over `{panel.x}`:"
            curves = [(curve, metric) for curve in panel.curves for metric in experiment.metrics]
            yield _table(
                f"system | metric | {' | '.join(map(_cell, panel.places))}",
                [[c.name, m.replace("_", " "), *(_value(c, at, m) for at in panel.places)] for c, m in curves],
            )


def _value(curve: Curve, at: Any, metric: str) -> Any:
    """A curve's value at a place of the axis; for a run that failed, the first words of its error."""
    for point in curve.points:
        if point.at == at:
            return point.error.partition(":")[0] if point.error else point.ours(metric)
    return None


def _miniature_provenance(results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """That of the first run, with the dates of the first and of the last one."""
    runs = sorted((run for lines in results.values() for run in lines.values()), key=lambda run: run["date"])
    return runs[0] | {"date": f"{runs[0]['date']} to {runs[-1]['date']}"}


def _simulator(data: Json) -> Iterable[str]:
    errors, left_out = data["held_out_errors"], data["left_out"]
    yield (
        f"{len(data['rows'])} of the paper's published runs, replayed with their exact requests; the other "
        f"{sum(one['rows'] for one in left_out)} are left out for the reasons below. The simulator's efficiencies were "
        f"fitted to {len(data['fitted_rows'])} runs, which count in no error. Errors of throughput and first token are "
        "relative, attainment's are differences."
    )
    rows = []
    for system, found in errors.items():
        first, attainment = _pick(found, "first_token_latency.median attainment.median")
        throughput = _pick(found, "throughput.median throughput.p90")
        rows.append([system, found["rows"], *map(_percent, throughput), _percent(first), attainment])
    columns = "throughput, median error | p90 | first token of 1 s or more, median error | attainment, median error"
    yield _table(f"held-out runs | runs | {columns}", rows)
    yield "Throughput by device; a positive mean says that the simulator is too fast:"
    rows = []
    for system, found in errors.items():
        for device, one in found["by_device"].items():
            median, bias = _pick(one["throughput"], "median bias")
            rows.append([system, device, one["rows"], _percent(median), f"{bias:+.1%}"])
    yield _table("system | device | runs | median error | mean signed error", rows)
    yield "Pairs of systems in the published order:"
    yield _table("figure | in order | pairs", [_pick(figure, "title right pairs") for figure in data["order"].values()])
    yield "Knees: the request rate at which a system falls behind. *Below* and *above*: outside the rates that ran."
    rows = []
    for knee in data["knees"]:
        rates = [knee[source]["rate"] or knee[source]["side"] for source in ("published", "simulated")]
        rows.append([knee["sweep"], *rates, _percent(knee["error"])])
    yield _table("sweep | published | simulated | error", rows)
    yield _table("left out | runs | reason", [_pick(one, "system rows reason") for one in left_out])
    yield _table(
        "simulated run | virtual seconds per second of CPU time", data["virtual_seconds_per_cpu_second"].items()
    )


def _compiled(*reports: Json) -> Iterable[str]:
    yield (
        f"The step programs of Llama-3-8B, {reports[0]['dtype']}, ranks up to {reports[0]['max_lora_rank']}, compiled "
        "without a GPU. *Kernels*: of one layer. *Registers*: of the largest shrink, expand and attention kernel."
    )
    yield _table(
        "GPU | program | rows | temporaries | outputs | kernels | registers | spilled bytes | pool updated in place",
        [_program(r["target"], program) for r in reports for program in r["programs"] if program["kernels"]],
    )
    yield "What the pool holds, beside the weights:"
    rows = []
    for report in reports:
        pool = report["pool"]
        sizes = map(_gigabytes, _pick(pool, "memory_bytes weight_bytes"))
        adapters = f"{pool['adapters']:,} of rank {pool['adapter_rank']}"
        rows.append([report["target"].upper(), *sizes, *_pick(pool, "num_pages tokens"), adapters])
    yield _table("GPU | memory | weights | pages | tokens of KV | or adapters", rows)


def _program(target: str, program: Json) -> list[Any]:
    kernels, registers = program["kernels"], []
    counts = Counter("LoRA" if "lora" in kernel["name"] else "attention" for kernel in kernels)
    for kind in ("shrink", "expand", "attention"):
        registers += sorted(kernel["registers"] for kernel in kernels if kind in kernel["name"])[-1:]
    return [
        target.upper(),
        f"`{program['name']}`",
        program["tokens"],
        *(f"{size / 1e6:.1f} MB" for size in _pick(program, "temp_bytes output_bytes")),
        " + ".join(f"{count} {kind}" for kind, count in counts.items()),
        _listed(registers),
        sum(kernel["spill_bytes"] for kernel in kernels),
        not program["copies"] and program["aliased_bytes"] >= program["pool_bytes"],
    ]


def _parallel(data: Json) -> Iterable[str]:
    rank, share = _pick(data, "config.max_lora_rank config.gpu_memory_fraction")
    yield (
        f"Large models over several {data['target'].upper()}s, compiled without a GPU: ranks up to {rank}, {share:.0%} "
        "of the memory. `llama-30b` and `llama-70b` are the paper's shapes. *As published*: the compiled collectives "
        "are those of the paper's formula, to the byte."
    )
    rows = []
    for row in data["rows"]:
        programs = row["programs"]
        model, devices, weights, *pool = _pick(row, "model tensor_parallel_size weight_bytes pages tokens")
        adapters = " / ".join(f"{count:,}" for count in row["adapters"].values())
        found = [
            all(p["as_published"] for p in programs),
            *(sum(p[n] for p in programs) for n in ("spills", "pool_copies")),
        ]
        layers = f"{row['compiled_layers']} of {row['layers']}"
        rows.append([model, devices, _gigabytes(weights), *pool, adapters, layers, *found])
    columns = "layers compiled | collectives as published | spilled bytes | pool copies"
    ranks = " / ".join(data["rows"][0]["adapters"])
    yield _table(
        f"model | GPUs | weights per GPU | pages | tokens of KV | or adapters of rank {ranks} | {columns}", rows
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


SECTIONS: Mapping[str, Section] = {
    "vllm": Section("Against vLLM's LoRA", "make bench-vllm", ("vllm_comparison.json",), _vllm),
    "peft": Section("Against Hugging Face PEFT", "make bench", ("measured/peft_comparison.jsonl",), _peft, _of_first),
    "mechanisms": Section(
        "Mechanisms on and off",
        "make bench MEASURED=mechanisms",
        ("measured/mechanisms.jsonl", "measured/mechanisms_simulated.jsonl"),
        _mechanisms,
        _of_first,
    ),
    "serving": Section(
        "HTTP under load", "make bench MEASURED=serving_load", ("measured/serving_load.jsonl",), _serving, _of_first
    ),
    "replicas": Section(
        "Routing by adapter",
        "make bench MEASURED=replica_affinity",
        ("measured/replica_affinity.jsonl",),
        _replicas,
        _of_first,
    ),
    "starts": Section(
        "Time to start", "python -m experiments.start_times --model MODEL", ("start_times.json",), _starts
    ),
    "memory": Section(
        "Memory of a process", "python -m experiments.memory_parts --model MODEL", ("memory_parts.json",), _memory
    ),
    "scheduler": Section(
        "Time to plan a step", "python -m experiments.scheduler_benchmark", ("scheduler_benchmark.json",), _scheduler
    ),
    "miniature": Section(
        "The paper in miniature", "make miniature", ("miniature",), _miniature, where=_miniature_provenance
    ),
    "simulator": Section(
        "The simulator against the published runs",
        "python -m experiments.simulator_validation",
        ("simulator/validation.json",),
        _simulator,
    ),
    "compiled": Section(
        "Compiled for one GPU",
        "slora compile-report --model-config experiments/models/llama-3-8b.json --target h200 "
        "--max-num-batched-tokens 2048 --max-num-seqs 256 --json FILE",
        tuple(f"compile_reports/llama-3-8b_{target}.json" for target in ("h200", "a100", "l4")),
        _compiled,
        where=lambda report: {},
    ),
    "parallel": Section(
        "Compiled for several GPUs",
        "python -m experiments.tp_compile_table --layers 2",
        ("compile_reports/tensor_parallel_h200.json",),
        _parallel,
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


# Documents


def results_page() -> str:
    """The text of docs/results.md."""
    anchors = {s.title: re.sub(r"[^\w -]", "", s.title.lower()).replace(" ", "-") for s in SECTIONS.values()}
    contents = "\n".join(f"- [{title}](#{anchor})" for title, anchor in anchors.items())
    sections = [section.markdown() for section in SECTIONS.values()]
    others = _table("command | makes", [(f"`{command}`", makes) for command, makes in OTHER_COMMANDS.items()])
    return "\n\n".join([INTRODUCTION, contents, *sections, "## Other commands", others]) + "\n"


def result_rows() -> str:
    """The README's table."""
    (vllm,), (peft,), (mechanisms, _), (serving,), (simulator,) = (
        SECTIONS[name].content() for name in ("vllm", "peft", "mechanisms", "serving", "simulator")
    )
    phases, (few, many) = vllm["phases"], vllm["settings"]["many_adapters"]
    base, lora = (phases[name]["slora-jax over vllm"]["median_of_pairs"] for name in ("base", "lora"))
    (grouped_name, grouped), (_, mixed), *_ = _peft_ratios(peft).items()
    shifting = [line for line in mechanisms.values() if line["panel"] == "shifting" and "over" in line]
    splits = sorted(line["over"]["ratios"]["throughput"] for line in shifting)
    served = _line(serving, run__load_test__side="served")
    users, adapters = _pick(served["run"], "client.users adapters.count")
    error, runs = _pick(simulator["held_out_errors"]["slora"], "throughput.median rows")
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
            f"median throughput error {_percent(error)} over {runs} held-out runs",
        ),
    }
    return _table(
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


BLOCKS: Mapping[str, Callable[[], str]] = {"starts": start_sentence, "results": result_rows}
"""The README's blocks, each between `<!-- NAME -->` and `<!-- /NAME -->`."""


def with_blocks(text: str) -> str:
    """Returns the README with its blocks renewed. Raises ValueError unless each block is there exactly once."""
    for name, made in BLOCKS.items():
        block = f"<!-- {name} -->\n{made()}\n<!-- /{name} -->"
        before, after = re.split(f"<!-- {name} -->\n.*?<!-- /{name} -->", text, flags=re.S)
        text = before + block + after
    return text


def documents() -> dict[Path, str]:
    """Returns the text that each document should have."""
    return {PAGE: results_page(), README: with_blocks(README.read_text())}


def main() -> None:
    argparse.ArgumentParser(prog="python -m experiments.results_page", description=__doc__).parse_args()
    for path, text in documents().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
