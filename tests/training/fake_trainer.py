"""A trainer without a model: an adapter's loss is the distance of its weights to the mean of the trained tokens."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from slora_jax.adapters import BaseGeometry, LoraAdapter, LoraConfig
from slora_jax.adapters.peft_format import adapter_of
from slora_jax.adapters.targets import resolve_targets
from slora_jax.training import Adam, Example, Outcome, StepReport

GEOMETRY = BaseGeometry(
    num_layers=1, hidden_size=4, q_width=4, kv_width=4, intermediate_size=4, page_size=8
)  # of the adapters written


class Killed(BaseException):
    """The process was killed."""


class FakeTrainer:
    """Attributes:
    failures: adapter -> error of its next step at or after a step, and that step.
    dies_at: number of calls after which `Killed` is raised.
    calls: calls so far.
    """

    def __init__(self, failures: Mapping[str, tuple[int, str]] | None = None, dies_at: int | None = None) -> None:
        self.failures, self.dies_at, self.calls = failures or {}, dies_at, 0
        self.weights: dict[str, np.ndarray] = {}  # [1] float32
        self.gradients: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.optimizers: dict[str, Adam] = {}
        self.configs: dict[str, LoraConfig] = {}

    def add(self, name: str, adapter: LoraConfig, optimizer: Adam, seed: int) -> None:
        self.configs[name], self.optimizers[name] = adapter, optimizer
        self.weights[name], self.steps[name] = np.array([float(seed)], np.float32), 0

    def forward(self, batches: Mapping[str, Sequence[Example]]) -> dict[str, Outcome]:
        self._called()
        return {name: Outcome(abs(self._distance(name, batch)), [], None) for name, batch in batches.items()}

    def forward_backward(self, batches: Mapping[str, Sequence[Example]]) -> dict[str, Outcome]:
        outcomes = self.forward(batches)
        for name, batch in batches.items():
            assert np.isclose(sum(one.weights.sum() for one in batch), 1)
            self.gradients[name] = self._distance(name, batch)
        return outcomes

    def optim_step(self, names: Iterable[str]) -> dict[str, StepReport]:
        self._called()
        return {name: self._stepped(name) for name in names}

    def adapter(self, name: str) -> LoraAdapter:
        self._called()
        targets = resolve_targets(self.configs[name], GEOMETRY.num_layers)
        a = {key: np.full((target.rank, 4), self.weights[name][0], np.float32) for key, target in targets.items()}
        b = {key: np.zeros((4, target.rank), np.float32) for key, target in targets.items()}
        return adapter_of(self.configs[name], targets, a, b, GEOMETRY.num_layers)

    def state(self, name: str) -> dict[str, np.ndarray]:
        self._called()
        return {"weights": self.weights[name].copy(), "step": np.array(self.steps[name])}

    def restore(self, name: str, state: Mapping[str, np.ndarray]) -> None:
        self.weights[name], self.steps[name] = state["weights"], int(state["step"])

    def _stepped(self, name: str) -> StepReport:
        step, gradient = self.steps[name], self.gradients[name]
        rate = float(self.optimizers[name].learning_rate(step))  # type: ignore[operator]
        at, error = self.failures.get(name, (None, None))
        if at == step:
            return StepReport(step, float("nan"), rate, error)
        self.weights[name] = self.weights[name] - np.float32(rate * gradient)
        self.steps[name] += 1
        return StepReport(step + 1, abs(gradient), rate, None)

    def _distance(self, name: str, batch: Sequence[Example]) -> float:
        return float(self.weights[name][0] - sum((one.targets * one.weights).sum() for one in batch))

    def _called(self) -> None:
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1
