"""A section of docs/results.md: a command, its results files, and the text made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.results_file import read_results
from experiments.results_page.table import pick

EXPERIMENTS = Path(__file__).parents[1]


ROOT = EXPERIMENTS.parent


RESULTS = EXPERIMENTS / "results"


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

    def text(self) -> str:
        """The section without its title."""
        content = self.content()
        head = f"`{self.command}` writes {self.links('../')}."
        return "\n\n".join([head, *_provenance(self.where(content[0])), *self.body(*content)])

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.text()}"


def _read(path: Path) -> Any:
    if path.is_dir():
        return {file.stem: read_results(file) for file in sorted(path.glob("*.jsonl"))}
    return read_results(path) if path.suffix == ".jsonl" else json.loads(path.read_text())


def of_first(lines: Lines) -> Json:
    return next(iter(lines.values()))


def _provenance(found: Mapping[str, Any]) -> Iterable[str]:
    """Date, machine, versions and revision in one line."""
    if found:
        versions = {"Python": found["python"], **found["versions"]}
        for worker in found.get("workers", {}).values():
            versions |= {name: version for name, version in worker.items() if name not in ("python", *versions)}
        cpu, cores, memory, system = pick(found["machine"], "cpu cores memory_gib system")
        yield (
            f"{found['date']}; {cpu}, {cores} cores, {memory} GiB, {system}; "
            f"{', '.join(f'{name} {version}' for name, version in versions.items())}; revision {found['git']}."
        )
