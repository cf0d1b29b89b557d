"""The loop of `slora train`: trains the adapters of a recipe together, with evaluation, log, checkpoints and output."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slora_jax.adapters import LoraAdapter, write_peft
from slora_jax.engine.interrupts import InterruptHeld
from slora_jax.training.checkpoint import Checkpoints, Key, replace_directory
from slora_jax.training.config import Adam
from slora_jax.training.curves import StepLog, draw_curves
from slora_jax.training.data import Dataset, examples
from slora_jax.training.recipe import AdapterRecipe, Recipe
from slora_jax.training.trainer import Outcome, StepReport, Trainer

_NAMED = 4
"""Most adapters whose losses fit beside the progress bar."""


@dataclass
class Course:
    """The course of one adapter's training.

    Attributes:
      total: optimizer steps planned.
      step: steps taken.
      first_loss, last_loss: mean loss of a trained token in the first and last step.
      evaluation_loss: mean loss of an evaluation token in the last evaluation.
      best_loss, best_step: the lowest such loss, and its step.
      since_best: evaluations since then.
      has_ended: whether all steps were taken, or early stopping ended the training.
      stopped: why the adapter was stopped before its end, or None.
    """

    total: int
    step: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    evaluation_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    since_best: int = 0
    has_ended: bool = False
    stopped: str | None = None

    @property
    def is_running(self) -> bool:
        """Returns whether further steps follow."""
        return not self.has_ended and self.stopped is None

    def evaluated(self, loss: float, patience: int | None) -> bool:
        """Records an evaluation, which ends the training after `patience` without improvement. Returns whether its loss
        is the lowest so far."""
        self.evaluation_loss = loss
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.since_best = loss, self.step, 0
            return True
        self.since_best += 1
        if patience is not None and self.since_best >= patience:
            self.has_ended = True
        return False


class Run:
    """Trains the adapters of a recipe together.

    Each iteration takes one optimizer step of every adapter that has steps left. All state is in the trainer, in
    `courses`, and in the weights of the best evaluations; a checkpoint contains the three.
    """

    def __init__(
        self,
        recipe: Recipe,
        datasets: Mapping[str, Dataset],
        trainer: Trainer,
        checkpoints: Checkpoints,
        base: str,
        progress: bool = True,
    ) -> None:
        """Adds the adapters to the trainer, and restores the newest checkpoint if there is one.

        Args:
          base: name of the base model, for the adapters' files.
          progress: whether to show a progress bar.
        """
        self._recipe, self._datasets, self._trainer = recipe, datasets, trainer
        self._checkpoints, self._base, self._progress = checkpoints, base, progress
        self._evaluation = {name: examples(data.evaluation) for name, data in datasets.items() if data.evaluation}
        self._best: dict[str, LoraAdapter] = {}
        self._written: set[str] = set()
        self.iteration = 0
        self.courses = {name: Course(datasets[name].steps(one)) for name, one in recipe.adapters.items()}
        for name, adapter in recipe.adapters.items():
            trainer.add(name, adapter.lora, optimizer(adapter, self.courses[name].total), adapter.seed)
        size = self._restore()
        self._log = StepLog(recipe.output / "log.jsonl", size)

    def run(self) -> dict[str, Course]:
        """Trains to the end and returns the course of every adapter.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed; the step under way was completed and a checkpoint written. A second
            Ctrl-C raises at once.
        """
        total = max(course.total for course in self.courses.values())
        bar = tqdm(total=total, initial=self.iteration, desc="training", unit="step", disable=not self._progress)
        with bar, closing(self._log), InterruptHeld() as interrupt:
            self._write_ended()
            while self._running() and not interrupt.is_pending:
                lines = self._step()
                self._evaluate(lines)
                self._log.write(lines.values())
                self._write_ended()
                if self.iteration % self._recipe.checkpoint_every == 0 or not self._running():
                    self._save()
                bar.update()
                bar.set_postfix_str(self._losses(), refresh=False)
            self._save()
            draw_curves(self._log.path, self._recipe.output / "curves.png")
        if interrupt.is_pending and self._running():
            tqdm.write(
                f"slora: stopped after step {self.iteration} of {total}; the same command continues", file=sys.stderr
            )
            raise KeyboardInterrupt
        return self.courses

    def _running(self) -> list[str]:
        return [name for name, course in self.courses.items() if course.is_running]

    def _step(self) -> dict[str, dict[str, Any]]:
        """Takes one optimizer step of every running adapter. Returns each one's line of the log."""
        batches = {}
        for name in self._running():
            adapter = self._recipe.adapters[name]
            batches[name] = self._datasets[name].batch(adapter, self.courses[name].step)
        outcomes = self._trainer.forward_backward({name: examples(batch) for name, batch in batches.items()})
        reports = self._trainer.optim_step([name for name, outcome in outcomes.items() if outcome.error is None])
        self.iteration += 1
        return {
            name: self._stepped(name, sum(one.num_trained for one in batch), outcomes[name], reports.get(name))
            for name, batch in batches.items()
        }

    def _stepped(self, name: str, tokens: int, outcome: Outcome, report: StepReport | None) -> dict[str, Any]:
        course = self.courses[name]
        line = {"step": course.step + 1, "adapter": name, "loss": outcome.loss, "tokens": tokens}
        if report is not None:
            line |= {"grad_norm": report.grad_norm, "learning_rate": report.learning_rate}
        if error := outcome.error or (report and report.error):
            self._stop(name, error)
            return line | {"error": error}
        course.step += 1
        course.first_loss = outcome.loss if course.first_loss is None else course.first_loss
        course.last_loss = outcome.loss
        course.has_ended = course.step == course.total
        return line

    def _evaluate(self, lines: Mapping[str, dict[str, Any]]) -> None:
        """Evaluates the adapters that are due, and adds the losses to their lines of the log."""
        every = self._recipe.evaluate_every
        due = []
        for name in lines.keys() & self._evaluation.keys():
            course = self.courses[name]
            if course.stopped is None and (course.has_ended or (every is not None and course.step % every == 0)):
                due.append(name)
        if not due:
            return
        outcomes = self._trainer.forward({name: self._evaluation[name] for name in self.courses if name in due})
        for name, outcome in outcomes.items():
            if outcome.error is not None:
                self._stop(name, outcome.error)
                lines[name]["error"] = outcome.error
                continue
            lines[name]["evaluation_loss"] = outcome.loss
            patience = self._recipe.adapters[name].early_stopping
            if self.courses[name].evaluated(outcome.loss, patience) and patience is not None:
                self._best[name] = self._trainer.adapter(name)

    def _stop(self, name: str, reason: str) -> None:
        self.courses[name].stopped = reason
        tqdm.write(f"slora: adapter {name!r} is stopped at step {self.courses[name].step}: {reason}", file=sys.stderr)

    def _write_ended(self) -> None:
        """Writes the adapters whose training has ended: the best weights with early stopping, otherwise the last."""
        for name, course in self.courses.items():
            if course.stopped is not None or not course.has_ended or name in self._written:
                continue
            scratch = self._recipe.output / ".new"
            shutil.rmtree(scratch, ignore_errors=True)  # of a killed process
            adapter = self._best[name] if name in self._best else self._trainer.adapter(name)
            base = adapter.config.base_model_name_or_path or self._base
            write_peft(scratch / "new", adapter, base_model_name_or_path=base)
            replace_directory(adapter_directory(self._recipe, name), scratch)
            self._written.add(name)

    def _save(self) -> None:
        """Writes a checkpoint of everything that the rest of the run depends on."""
        arrays: dict[Key, np.ndarray] = {}
        for name, course in self.courses.items():
            if course.stopped is None:
                arrays |= {("state", name, key): array for key, array in self._trainer.state(name).items()}
        for name, best in self._best.items():
            for side, matrices in (("a", best.a), ("b", best.b)):
                for (layer, projection), matrix in matrices.items():
                    arrays["best", name, side, str(layer), projection] = matrix
        data = {
            "iteration": self.iteration,
            "log_bytes": self._log.size(),
            "courses": {name: asdict(course) for name, course in self.courses.items()},
        }
        self._checkpoints.save(self.iteration, data, arrays)

    def _restore(self) -> int:
        """Restores the newest checkpoint, if any. Returns the bytes of the log that belong to it."""
        if (saved := self._checkpoints.restore()) is None:
            return 0
        data, arrays = saved
        self.iteration = data["iteration"]
        self.courses = {name: Course(**course) for name, course in data["courses"].items()}
        states: dict[str, dict[str, np.ndarray]] = {}
        matrices: dict[str, dict[str, dict[tuple[int, str], np.ndarray]]] = {}
        for (kind, name, *key), array in arrays.items():
            if kind == "state":
                states.setdefault(name, {})[key[0]] = array
            else:
                side, layer, projection = key
                matrices.setdefault(name, {"a": {}, "b": {}})[side][int(layer), projection] = array
        for name, state in states.items():
            self._trainer.restore(name, state)
        for name, best in matrices.items():
            self._best[name] = replace(self._trainer.adapter(name), a=best["a"], b=best["b"])
        return int(data["log_bytes"])

    def _losses(self) -> str:
        """The last losses, for the progress bar: of a few adapters each, of many the mean and the highest."""
        losses = {name: course.last_loss for name, course in self.courses.items() if course.last_loss is not None}
        if len(losses) <= _NAMED:
            return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        worst = max(losses, key=lambda name: losses[name])
        return f"mean {sum(losses.values()) / len(losses):.3f}, highest {losses[worst]:.3f} ({worst})"


def optimizer(adapter: AdapterRecipe, total: int) -> Adam:
    """Returns the optimizer of an adapter that is trained for `total` steps."""
    factors, peak = schedule_factors(adapter.schedule, adapter.warmup, total), adapter.learning_rate
    return Adam(
        learning_rate=lambda step: peak * factors[min(step, total - 1)],
        b1=adapter.b1,
        b2=adapter.b2,
        eps=adapter.eps,
        weight_decay=adapter.weight_decay,
        clip_norm=adapter.clip_norm,
    )


@cache
def schedule_factors(schedule: str, warmup: int, total: int) -> list[float]:
    """Returns the learning rate of each step as a share of its peak, by optax's schedules."""
    import optax

    left = max(1, total - warmup)
    after = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, left),
        "cosine": optax.cosine_decay_schedule(1.0, left),
    }[schedule]
    whole = optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup]) if warmup else after
    factors: list[float] = np.broadcast_to(np.asarray(whole(np.arange(total)), np.float64), total).tolist()
    return factors


def adapter_directory(recipe: Recipe, name: str) -> Path:
    """The PEFT directory of a trained adapter."""
    return recipe.output / "adapters" / name
