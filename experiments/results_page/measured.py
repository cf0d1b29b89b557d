"""Sections on what was measured on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from experiments.results_page.paper import collect_results
from experiments.results_page.section import EXPERIMENTS, Json, Lines
from experiments.results_page.table import listed, pick, table
from experiments.rounds import ratios


def vllm(data: Json) -> Iterable[str]:
    settings, alone = data["settings"], data["phases"]["alone"]
    layers, width = pick(settings, "model.random.layers model.random.hidden")
    yield (
        f"Output tokens per second in float32: a random Llama of {layers} layers and width {width}, "
        f"{settings['requests']} requests of {settings['prompt_low']} to {settings['prompt_high']} prompt tokens and "
        f"{settings['output']} new tokens, adapters of rank {listed(settings['ranks'])} on q, k, v and o. Medians. "
        "*Ratio* is the median over rounds in which the two systems ran one after the other."
    )
    rows = []
    for name, adapters in (("base", "none"), ("lora", settings["adapters"])):
        phase = data["phases"][name]
        medians = pick(phase, "slora-jax.tokens_per_second.median vllm.tokens_per_second.median")
        equal, requests = pick(phase["requests_with_equal_tokens"], "equal of")
        ratio, rounds = phase["slora-jax over vllm"]["median_of_pairs"], len(phase["vllm"]["seconds"])
        rows.append([adapters, *medians, ratio, f"{equal} of {requests}", rounds])
    yield table("adapters | slora-jax | vLLM | ratio | requests with equal tokens | rounds", rows)
    few, many = settings["many_adapters"]
    yield (
        f"slora-jax alone. {few} and {many:,} adapters have rank {settings['many_rank']} and "
        f"{settings['many_requests']} requests:"
    )
    rates = {name: run["tokens_per_second"]["median"] for name, run in alone.items() if "tokens_per_second" in run}
    ratios = {name: run["median_of_pairs"] for name, run in alone.items() if "median_of_pairs" in run}
    yield table(
        "adapters | tokens per second", [["none", rates.pop("base")], *((int(n), rate) for n, rate in rates.items())]
    )
    yield table("ratio, median over rounds | ", ratios.items())


def find_line(lines: Lines, **wanted: Any) -> Json:
    """Returns the line of the run with these fields, whose dots are underlines twice: `system__name="slora"`."""
    for line in lines.values():
        if all(pick(line, name.replace("__", "."))[0] == value for name, value in wanted.items()):
            return line
    raise ValueError(f"no line has {wanted}")


def _ratio(one: Json, other: Json, metric: str) -> float:
    """Returns the median over the rounds of a metric over the other run's."""
    return ratios(one["rounds"], other["rounds"])[metric]


def peft_ratios(lines: Lines) -> dict[str, float]:
    """Returns the ratios of the comparison with PEFT, by their description."""
    beside = [line for line in lines.values() if line["panel"] == "beside PEFT"]
    counts = sorted({line["run"]["adapters"]["count"] for line in beside})
    runs = {(*pick(line["run"], "system.name adapters.count"),): line for line in beside}
    many = {line["run"]["workload"]["parameters"]["used"]: line for line in lines.values() if line not in beside}
    found = {
        f"slora over {name}, {counts[-1]} adapters": (runs["slora", counts[-1]], runs[system, counts[-1]])
        for name, system in (("peft-grouped", "peft"), ("peft-mixed", "peft-mixed"))
    }
    found[f"{max(many)} adapters over {min(many)}"] = (many[max(many)], many[min(many)])
    found |= {f"{n} adapters over base only": (runs["slora", n], runs["slora", 0]) for n in counts[1:]}
    return {name: _ratio(*pair, "token_throughput") for name, pair in found.items()}


def peft(lines: Lines) -> Iterable[str]:
    beside = [line for line in lines.values() if line["panel"] == "beside PEFT"]
    first, many = beside[0]["run"], [line["run"] for line in lines.values() if line not in beside]
    model = json.loads((EXPERIMENTS / "models" / f"{first['model']}.json").read_text())
    layers, width = pick(model, "num_hidden_layers hidden_size")
    requests, (low, high), (output, _) = pick(
        first, "workload.parameters.requests workload.parameters.input_range workload.parameters.output_range"
    )
    peft = [line for line in beside if line["run"]["system"]["name"] != "slora"]
    same = sorted({f"{line['same_tokens'][0]} of {line['same_tokens'][1]}" for line in peft})
    yield (
        f"Output tokens per second in float32: a random Llama of {layers} layers and width {width}, adapters of rank "
        f"{listed(first['adapters']['ranks'])} on q, k, v and o, {requests} requests of {low} to {high - 1} prompt "
        f"tokens and {output} new tokens, all submitted at the start. Medians of {first['measured']['rounds']} rounds, "
        "in each of which every system runs once. Requests with the same tokens as PEFT's, in every pairing: "
        f"{listed(same)}."
    )
    rates = {(*pick(line["run"], "system.name adapters.count"),): line["metrics"] for line in beside}
    yield table(
        "adapters | slora-jax | PEFT, grouped by adapter | PEFT, mixed batch",
        [
            [n or "base", *(rates.get((s, n), {}).get("token_throughput") for s in ("slora", "peft", "peft-mixed"))]
            for n in sorted({adapters for _, adapters in rates})
        ],
    )
    yield table("ratio, median over rounds | ", peft_ratios(lines).items())
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


def mechanisms(lines: Lines, simulated: Lines) -> Iterable[str]:
    rounds, disk = pick(next(iter(lines.values()))["run"], "measured.rounds measured.disk_seconds")
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
        rows.append([*pick(line, "panel curve"), relative, *figures])
    yield table(f"load | {MECHANISM_COLUMNS}", rows)
    yield "### The same in the simulator"
    rows = []
    for panel in collect_results("beyond", "mechanisms", simulated).panels:
        points = [(curve.name, point) for curve in panel.curves for point in curve.points]
        first = points[0][1].metrics["throughput"]
        for name, point in points:
            figures = [point.ours(field) for field in MECHANISM_FIELDS]
            rows.append([panel.title, name, point.metrics["throughput"] / first, *figures])
    yield table(f"device, workload and mechanism | {MECHANISM_COLUMNS}", rows)


def serving(lines: Lines) -> Iterable[str]:
    yield from load(lines)
    grown = find_line(lines, run__load_test__side="soak")["metrics"]
    first, last, most = (grown[f"rss_mib_{at}"] for at in ("first", "last", "most"))
    yield (
        f"A soak of {grown['seconds']:.0f} s, {grown['requests']:,} requests: {grown['failed']} failures, "
        f"{grown['pages_lost']} pages lost; {first:,.0f} MiB resident after warm-up, {last:,.0f} at the end, "
        f"{most:,.0f} at most."
    )


def load(lines: Lines) -> Iterable[str]:
    alone, served = (find_line(lines, run__load_test__side=side) for side in ("alone", "served"))
    run = served["run"]
    trained = run["load_test"].get("trained")
    users, adapters, ranks, requests, tokens = pick(
        run, "client.users adapters.count adapters.ranks workload.parameters.requests system.settings.num_tokens"
    )
    yield (
        f"{users} concurrent streams over {adapters} adapters of rank {listed(ranks)}, {requests} requests a round, a "
        f"pool of {tokens:,} tokens, client and server on one machine. *Engine* runs the same requests without HTTP. "
        + (f"The adapters of `{trained}` are among them; the others are random. " if trained else "")
        + "Output tokens per second:"
    )
    rounds = []
    for number, (one, other) in enumerate(zip(alone["rounds"], served["rounds"], strict=True), 1):
        rounds.append([number, one["goodput"], other["goodput"], other["goodput"] / one["goodput"], other["failed"]])
    medians = [line["metrics"]["goodput"] for line in (alone, served)]
    rounds.append(["median", *medians, served["over"]["ratios"]["goodput"], None])
    yield table("round | engine | over HTTP | ratio | failures", rounds)
    yield "Requests over HTTP with the engine's tokens: {} of {}.".format(*served["same_tokens"])
    cpu = {name: served["metrics"][f"cpu_microseconds_per_token_of_{name}"] for name in ("main_thread", "client")}
    engines = [line["metrics"]["cpu_microseconds_per_token_of_engine"] for line in (served, alone)]
    costs = {
        "event loop": cpu["main_thread"],
        "client": cpu["client"],
        "server process, over the engine alone": engines[0] - engines[1],
    }
    yield table("CPU time per token, median | microseconds", costs.items())


SERVER_FIGURES = (
    "tokens_per_second", "cpu_us_per_token", "event_loop_us_per_token", "engine_us_per_token",
    "http_processes_us_per_token", "added_ms_p50", "added_ms_p99", "client_core_share",
)  # fmt: skip


def server(data: Json) -> Iterable[str]:
    yield (
        "The real server without a model. *Saturated*: steps take no time; *paced*: every stream gets a token at fixed "
        "times. CPU microseconds per token of the server, and of its parts: the thread with the event loop, the "
        "engine's thread, and HTTP processes. *Added* is the time from the engine's read of a token to its arrival, in "
        "milliseconds. The client shares the machine; near a share of 1 of a core it limits the rate. Medians of "
        f"{data['rounds']} rounds of {data['seconds']:g} s."
        + (f" *beside* is revision {data['beside']}." if data["beside"] else "")
    )
    rows = [
        [case, name, *map(medians.get, SERVER_FIGURES)]
        for case, servers in data["medians"].items()
        for name, medians in servers.items()
    ]
    parts = "event loop | engine | HTTP processes"
    yield table(f"load | server | tokens/s | CPU | {parts} | added p50 | added p99 | client's share of a core", rows)


def replicas(lines: Lines) -> Iterable[str]:
    count, adapters = pick(next(iter(lines.values())), "run.replicas.count run.adapters.count")
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
    rows = [pick(line, fields) for line in lines.values()]
    yield table(f"popularity of adapters | routed by {' | '.join(routes)} | ideal", shares)
    yield table("popularity of adapters | routed by | requests/s | latency p50 (s) | p99 (s) | adapter loads", rows)


def starts(data: Json) -> Iterable[str]:
    yield (
        "Seconds from the command line to the first output, or for `slora serve` to `/ready`. SmolLM2 (135M "
        f"parameters, float32), one start each, beside revision {data['beside']}. A first start has an empty cache of "
        "compiled programs."
    )
    fields = "here.answer_seconds here.peak_mib beside.answer_seconds beside.peak_mib"
    yield table(
        "start | seconds | peak MiB | seconds before | peak MiB before",
        [[name, *pick(start, fields)] for name, start in data["starts"].items()],
    )


def memory(data: Json) -> Iterable[str]:
    yield f"Resident memory of one process after each phase of a start, `{data['model']}` in float32."
    rows = [[name, *pick(size, "resident anonymous")] for name, size in data["mib_after"].items()]
    yield table("after | resident MiB | anonymous MiB", rows)
    arrays = listed(f"{name} {size:,.0f} MiB" for name, size in data["mib_by_shape"].items())
    yield f"Arrays, by their shapes: {arrays}. {data['programs_compiled']} programs were compiled."


def quantisation(data: Json) -> Iterable[str]:
    yield (
        f"Model: {data['model']}, dequantised to float32, which is the reference; {data['tokens']:,} tokens of the data"
        " of this project's small adapters. *Recovery* is the reference's perplexity over the format's. *KL* is the "
        "mean divergence from the reference with the same adapter, in nats per token, *agreement* the share of equal "
        "most probable tokens."
    )
    adapters = list(dict.fromkeys(row["adapter"] for row in data["rows"]))
    found = {(row["weights"], row["kv"], row["adapter"]): row for row in data["rows"]}
    lines = []
    for weights, kv in dict.fromkeys((row["weights"], row["kv"]) for row in data["rows"]):
        rows = [found[weights, kv, adapter] for adapter in adapters]
        perplexity, reference = rows[0]["perplexity"], found["float32", "float32", adapters[0]]["perplexity"]
        agreement = [f"{row['agreement']:.1%}" for row in rows]
        lines.append(
            [weights, kv, perplexity, f"{reference / perplexity:.1%}", *(row["kl"] for row in rows), *agreement]
        )
    measures = [f"{measure}, {adapter}" for measure in ("KL", "agreement") for adapter in adapters]
    yield table(" | ".join(["weights", "KV", "perplexity, base", "recovery, base", *measures]), lines)
    if (check := data["verification"]) is not None:
        yield (
            f"On one window of 512 tokens, without an adapter: KL {check['plain_in_transformers']:.3g} for weights "
            f"that NumPy rounds to the nearest of 15 levels in groups of {check['group']}, run by `transformers`; "
            f"{check['int4']:.3g} for the int4 of this engine; {check['unquantised']:.2g} between the two "
            "implementations without quantisation."
        )


def scheduler(data: Json) -> Iterable[str]:
    yield (
        f"Host time to plan one step, prefetch included, in milliseconds of CPU time: {data['running']:,} running and "
        f"{data['waiting']:,} waiting requests over {data['adapters']} adapters."
    )
    fields = "1x.schedule_ms 1x.schedule_p10_ms 1x.schedule_p95_ms 2x.schedule_ms ratio_at_twice_the_size"
    yield table(
        "policy | median | p10 | p95 | with twice the requests | ratio",
        [[name, *pick(case, fields)] for name, case in data["cases"].items()],
    )


def training(data: Json) -> Iterable[str]:
    yield (
        "Tokens/s of a training step (forward, backward, optimizer), and the process's peak memory. Model: "
        f"{data['model']}; float32. *Small* is one sequence of 64 tokens per adapter and step, *healthy* four of 512. "
        "PEFT trains one adapter after another; *stack* and *ragged_dot* are JAX programs with padded stacks of "
        "adapters. All losses agree to "
        f"{max(cell['largest_loss_difference'] for cell in data['cells']):.0e} of themselves."
    )
    rows = []
    for cell in data["cells"]:
        for name, one in cell["results"].items():
            ratio = one["slora_jax_over_it"]["median_of_pairs"] if "slora_jax_over_it" in one else None
            rows.append([cell["name"], name, one["tokens_per_second"]["median"], ratio, one["peak_mib"]])
    yield table("adapters | system | tokens/s | slora-jax over it | peak MiB", rows)


def publishing(data: Json) -> Iterable[str]:
    yield (
        "Seconds from trained weights to the first token of a request with them, while "
        f"{data['running_requests']} other requests run: by `Trainer.publish`, and by a PEFT directory that is written "
        f"and loaded. Programs compiled: {data['compilations']}."
    )
    fields = "publish.call publish.to_first_token files.call files.to_first_token files_over_publish"
    yield table(
        "adapter | publish | to first token | write and load | to first token | ratio",
        [[name, *pick(ways, fields)] for name, ways in data["adapters"].items()],
    )
