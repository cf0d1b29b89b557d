"""README.md and docs/*.md: Python runs, commands parse, settings are known, links exist, results are up to date."""

import argparse
import hashlib
import json
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_model import PAGE_SIZE, SMALL, TinyModel

from experiments.config import load_experiment, make_experiment
from experiments.results_page.documents import documents
from experiments.runners.simulated import run_simulated
from slora_jax import Engine, EngineConfig, cli
from slora_jax.adapters import random_adapter, write_peft
from slora_jax.cli.parser import make_parser
from slora_jax.engine import adapter_geometry
from slora_jax.models import ModelConfig
from slora_jax.serving.http.bodies import ChatBody, CompletionBody
from slora_jax.serving.settings import ServerSettings
from slora_jax.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(document.read_text() for document in DOCUMENTS)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
FOLDERS = {
    "docs", "experiments", "notebooks", "pallas_kernels", "slora_jax", "tests",
    *(folder.name for folder in (ROOT / "slora_jax").iterdir() if folder.is_dir()),
}  # fmt: skip
"""First parts of the paths that documents name: from the root, or from slora_jax/."""
ELSEWHERE = {"source", "hf", "pip", "git", "cd", ".venv/bin/jupyter"}
"""Commands that are not ours."""


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def commands() -> list[str]:
    """Every line of the shell blocks, and the commands in running text."""
    lines = [line for text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`((?:slora|make|python -m) [^`]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S))
    return list(dict.fromkeys([line for line in lines if line.strip()] + [" ".join(span.split()) for span in spans]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the adapters that the demo leaves."""
    directory = tmp_path_factory.mktemp("demo")
    (directory / "model").mkdir()
    TinyModel().save(directory / "model")
    geometry = adapter_geometry(ModelConfig.from_directory(directory / "model"), 16)
    for number in range(2):
        write_peft(directory / f"adapters/adapter-000{number}", random_adapter(geometry, 4, seed=number))
    return directory


@pytest.fixture
def place(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the documents speak of: a model, as the demo's and as a download, adapters, the
    experiments."""
    (tmp_path / ".demo").symlink_to(demo)
    for name, target in {
        "qwen": ".demo/model",
        "adapters": ".demo/adapters",
        "experiments": ROOT / "experiments",
    }.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "log.jsonl").write_text(
        '{"time": 0, "adapter": "adapter-0001", "prompt_tokens": 3, "output_tokens": 2}\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slora_jax.demo.smollm2.smollm2_path", lambda: tmp_path / ".demo/model")
    return tmp_path


@pytest.mark.parametrize("text", [text for text in blocks("python") if not text.startswith("# study.py")])
def test_a_python_block_runs_as_it_stands(place, text, monkeypatch) -> None:
    real = Engine.from_pretrained
    shape = SMALL | {"page_size": PAGE_SIZE, "dtype": "float32", "compile_ahead": False}

    def in_tests_shape(model, config=EngineConfig(), **options):  # noqa: B008
        return real(model, replace(config, **shape), **options)

    monkeypatch.setattr(Engine, "from_pretrained", in_tests_shape)
    exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})


def test_the_study_runs_and_its_policies_have_names_of_their_own(place, monkeypatch) -> None:
    [text] = [text for text in blocks("python") if text.startswith("# study.py")]
    (place / "study.py").write_text(text)
    monkeypatch.syspath_prepend(place)
    settings = yaml.safe_load("{" + text.splitlines()[0].removeprefix("# study.py: ") + "}")
    settings["system"] |= {"num_tokens": 4000}
    runs = make_experiment("study", settings | {"adapters": {"count": 3}}).runs
    assert [run.curve for run in runs] == ["slora, study:Shortest", "slora, fcfs"]
    first, second = (run_simulated(run.config) for run in runs)
    assert first["completed"] == second["completed"] == 60 and first["latency"] < second["latency"]


def test_settings_files_are_complete(place, monkeypatch) -> None:
    monkeypatch.setenv("APP_KEY", "sk-app")
    seen = set()
    for text in blocks("yaml"):
        name = re.match(r"# ([\w./]+)", text)[1]
        seen.add(name)
        if name == "server.yaml":
            text = text.replace("/data/adapters", "adapters").replace(
                "5e884898da28...", hashlib.sha256(b"x").hexdigest()
            )
            (place / name).write_text(text)
            assert ServerSettings.from_file(place / name, model_dir=place / "qwen").base_name == "llama-3-8b"
        elif name == "recipe.yaml":
            (place / name).write_text(text)
            assert len(Recipe.from_file(place / name).adapters) == 2
        else:
            (place / "example.yaml").write_text(text)
            assert len(load_experiment(place / "example.yaml").runs) == 8
    assert seen == {"server.yaml", "recipe.yaml", "experiments/configs/example.yaml"}


class Parsed(Exception):
    """A command line was accepted."""


def parse_and_stop(patch: pytest.MonkeyPatch) -> None:
    """From now on a command ends when it has parsed its arguments."""
    for name in ("parse_args", "parse_intermixed_args"):

        def parse(self, *args, real=getattr(argparse.ArgumentParser, name), **options):  # noqa: B008
            real(self, *args, **options)
            raise Parsed

        patch.setattr(argparse.ArgumentParser, name, parse)


def module(words: list[str], monkeypatch) -> None:
    """`python -m` in this process."""
    monkeypatch.setattr(sys, "argv", [words[0], *words[1:]])
    monkeypatch.delitem(sys.modules, words[0], raising=False)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("line", commands())
def test_a_command_is_accepted_by_its_own_parser(place, line, monkeypatch) -> None:
    words = shlex.split(line, comments=True)
    match words:
        case []:
            pass
        case ["make", *targets]:
            variables = {word.partition("=")[0]: word.partition("=")[2] for word in targets if "=" in word}
            known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
            assert {word for word in targets if "=" not in word} <= known
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(filter(None, variables.get("EXTRAS", "").split(","))) <= extras.keys()
            assert variables.keys() <= {*re.findall(r"^(\w+) :?=", (ROOT / "Makefile").read_text(), re.M)}
        case ["slora" | ".venv/bin/slora", *arguments]:
            monkeypatch.setattr("slora_jax.demo.smollm2.smollm2_path", lambda: Path("smollm2.gguf"))
            given = [word.replace("HOST:PORT", "h:1") for word in arguments]
            if len(given) < 2:  # a command's name
                with pytest.raises(SystemExit, match="0"):
                    make_parser().parse_args([*given, "--help"])
            else:
                make_parser().parse_args(["MODEL" if word == "..." else word for word in given])
        case ["python", "-m", *rest]:
            if "--dry-run" not in rest:
                parse_and_stop(monkeypatch)
            with pytest.raises((Parsed, SystemExit)) as ended:
                module(rest, monkeypatch)
            assert ended.type is Parsed or not ended.value.code
        case ["curl", *arguments]:
            body = json.loads(arguments[arguments.index("-d") + 1])
            kind = ChatBody if any("chat" in word for word in arguments) else CompletionBody
            kind.model_validate(body)
        case [command, *_]:
            assert command in ELSEWHERE, f"say in this test what {command!r} is"


def test_the_commands_of_the_documents_answer(place, capsys) -> None:
    (line,) = {line for line in commands() if line.startswith("slora generate qwen")}
    words = shlex.split(line, comments=True)
    assert cli.main([*words[1:], "--max-tokens=2", "--max-model-len=64"]) == 0
    assert capsys.readouterr().out.strip()


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_and_paths_exist(document) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`(\w[\w.-]*/[\w./-]*)`", text):
        if path.partition("/")[0] in FOLDERS:
            assert (ROOT / path).exists() or (ROOT / "slora_jax" / path).exists(), path


def test_results_are_those_of_the_committed_files() -> None:
    for path, text in documents().items():
        assert path.read_text() == text, f"{path.name} is out of date: run `make results`"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
