"""Trains many LoRA adapters of any rank at once, over one base model that an engine may be serving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora.training import training_tile_rows
from slora_jax.adapters import AdapterInfo, LoraAdapter, LoraConfig, read_peft
from slora_jax.engine.sizing import adapter_geometry
from slora_jax.errors import AdapterError, ConfigError, RequestError, UnknownAdapterError
from slora_jax.memory import PageKind
from slora_jax.models import ModelConfig, Params
from slora_jax.training.batch import Example, MicroBatch, Row, micro_batches, pack
from slora_jax.training.config import Adam, TrainerConfig
from slora_jax.training.losses import LOSSES, Loss
from slora_jax.training.pool import Targets, TrainingPool, initial_adapter, largest_ranks, trained_targets
from slora_jax.training.programs import HYPER, TrainingPrograms

if TYPE_CHECKING:
    from slora_jax.engine import Engine


@dataclass(frozen=True, eq=False)
class Outcome:
    """An adapter's part of a forward pass.

    Attributes:
      loss: sum over the tokens of its examples; NaN with an error.
      logprobs: log-probabilities of the targets, float32 `[n]` per example; empty with an error.
      error: why its data was refused or why it is stopped; None if all is well.
    """

    loss: float
    logprobs: list[np.ndarray]
    error: str | None = None


@dataclass(frozen=True)
class StepReport:
    """An adapter's part of an optimizer step.

    Attributes:
      step: steps taken, including this one if there is no error.
      grad_norm: norm of its gradient before clipping.
      error: why it did not change; None if it did.
    """

    step: int
    grad_norm: float
    learning_rate: float
    error: str | None = None


@dataclass(eq=False)
class _Trained:
    """An adapter in training. `ranks [7]` are the largest over the layers; `stopped` is the reason, if it is."""

    slot: int
    config: LoraConfig
    targets: Targets
    ranks: np.ndarray
    pages: np.ndarray
    optimizer: Adam
    step: int = 0
    stopped: str | None = None


class Trainer:
    """Adapters in training over one frozen base model.

    An adapter's numbers do not depend on the others: its rows, the order of its sums, its optimizer and its clipping
    are its own. If its loss or its gradient is not finite, it is stopped, and the others go on.

    All calls must come from one thread; if it shares an engine's weights, from the engine's.
    """

    def __init__(self, model: ModelConfig, params: Params, config: TrainerConfig) -> None:
        """Allocates the training pool. Programs are compiled when their shape is first used.

        Args:
          params: from `models.load_model` or `models.init_random`, or an engine's; never changed.
        """
        device = jax.tree.leaves(params)[0].sharding
        # Committed from the start, as results are: otherwise, the second step compiles every program again.
        params = jax.device_put(params, device)
        self.model, self.config, self.params = model, config, params
        self._ends = {name: leaf for name, leaf in params.items() if name != "layers"}
        self.geometry = adapter_geometry(model, config.page_size)
        self.pool = TrainingPool(self.geometry, config.num_pages, config.max_adapters, config.max_lora_rank, device)
        self.programs = TrainingPrograms(model, self.geometry.layout, params, config.max_lora_rank, config.remat)
        self._adapters: dict[str, _Trained] = {}

    @classmethod
    def from_pretrained(cls, model_dir: str | Path, config: TrainerConfig) -> Trainer:
        """Loads a Hugging Face directory or a GGUF file. Raises as `models.load_model`."""
        from slora_jax.engine.config import EngineConfig
        from slora_jax.engine.placement import load

        settings = EngineConfig(dtype=config.dtype, max_model_len=config.lengths[-1], progress=False)
        model, _, params = load(model_dir, settings.with_dtype())
        return cls(model, params, config)

    @classmethod
    def of_engine(cls, engine: Engine, config: TrainerConfig) -> Trainer:
        """Trains over the weights of an engine, without a copy. Raises ConfigError if they are sharded or merged."""
        if engine.config.tensor_parallel_size > 1:
            raise ConfigError(
                f"EngineConfig.tensor_parallel_size={engine.config.tensor_parallel_size}: training over sharded "
                "weights is not supported; must be 1"
            )
        if engine.config.lora == "merge":
            raise ConfigError("EngineConfig.lora='merge': training needs unmerged weights; use 'paged'")
        return cls(engine.model, engine.executor.device.params, config)

    # Adapters

    def names(self) -> list[str]:
        """The adapters in training, in order of their addition."""
        return list(self._adapters)

    def pages_of(self, lora: LoraConfig) -> int:
        """Pages of the training pool that an adapter takes. Raises AdapterError like `add`."""
        ranks = largest_ranks(trained_targets(lora, self.model.num_layers))
        return int(self.geometry.layout.num_pages(ranks))

    def add(
        self,
        name: str,
        adapter: LoraConfig | LoraAdapter | str | Path,
        optimizer: Adam | None = None,
        seed: int = 0,
    ) -> None:
        """Adds an adapter: a new one as PEFT initialises it (A from the seed, B zero), or an existing one.

        Raises:
          AdapterError: the name is in use, the adapter does not fit the model or the limits, or there is no room.
        """
        if name in self._adapters:
            raise AdapterError(f"name={name!r}: is in training already; remove it first, or use another name")
        if isinstance(adapter, LoraConfig):
            adapter = initial_adapter(adapter, self.geometry, seed)
        elif not isinstance(adapter, LoraAdapter):
            adapter = read_peft(adapter, self.geometry)
        if extras := adapter.config.extras or adapter.extras:
            raise AdapterError(f"adapter {name!r}: {', '.join(extras)} can be served but not trained; unset it")
        targets = trained_targets(adapter.config, self.model.num_layers)
        if targets.keys() != adapter.a.keys():
            raise AdapterError(f"adapter {name!r}: has LoRA on fused modules; it can be served but not trained")
        ranks, config = adapter.ranks.max(axis=0), self.config
        if ranks.max() > config.max_lora_rank:
            raise AdapterError(f"adapter {name!r} has rank {ranks.max()} but max_lora_rank is {config.max_lora_rank}")
        slots = set(range(config.max_adapters)) - {one.slot for one in self._adapters.values()}
        if not slots:
            raise AdapterError(f"adapter {name!r}: max_adapters={config.max_adapters} are in training; remove one")
        needed, free = int(self.geometry.layout.num_pages(ranks)), self.pool.allocator.available(PageKind.ADAPTER)
        if needed > free:
            raise AdapterError(
                f"adapter {name!r} needs {needed} pages of the training pool, {free} of {config.num_pages - 1} are "
                "free; remove an adapter, or raise num_pages"
            )
        slot = min(slots)
        pages = self.pool.add(slot, adapter)
        self._adapters[name] = _Trained(slot, adapter.config, targets, ranks, pages, optimizer or Adam())

    def remove(self, name: str) -> None:
        """Ends the training of an adapter and frees its pages."""
        trained = self._trained(name)
        self.pool.remove(trained.slot, trained.pages)
        del self._adapters[name]

    def stopped(self, name: str) -> str | None:
        """Why an adapter is stopped, or None."""
        return self._trained(name).stopped

    def adapter(self, name: str) -> LoraAdapter:
        """The present float32 weights."""
        trained = self._trained(name)
        return self.pool.adapter(trained.config, trained.targets, trained.ranks, trained.pages)

    def gradient(self, name: str) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
        """The accumulated gradient, `(layer, projection) -> (dA [r, d_in], dB [d_out, r])`."""
        trained = self._trained(name)
        return self.pool.gradient_of(trained.targets, trained.ranks, trained.pages)

    def publish(self, engine: Engine, name: str, served_name: str | None = None) -> AdapterInfo:
        """Makes an engine serve the present weights under a name, new or existing.

        Nothing is compiled and no file is written. Unfinished requests keep the old content; new ones, and the prefix
        cache, use the new. Raises AdapterError, with the served adapter unchanged, if a weight is not finite.
        """
        return engine.load_adapter(served_name or name, self.adapter(name))

    def state(self, name: str) -> dict[str, np.ndarray]:
        """All that `restore` needs to continue bit by bit: weights, moments and the number of steps."""
        trained = self._trained(name)
        arrays = {part: self.pool.read(part, trained.pages) for part in TrainingPool.STATE}
        return arrays | {"step": np.asarray(trained.step, np.int64)}

    def restore(self, name: str, state: Mapping[str, np.ndarray]) -> None:
        """Sets an adapter of the same config to a former state. A stopped adapter goes on from there."""
        trained = self._trained(name)
        for part in TrainingPool.STATE:
            self.pool.write(part, trained.pages, np.asarray(state[part], np.float32))
        self.pool.write("gradient", trained.pages, np.zeros_like(state["master"]))
        trained.step, trained.stopped = int(state["step"]), None

    # Training

    def forward(
        self, batches: Mapping[str, Sequence[Example]], loss: str | Loss = "cross_entropy"
    ) -> dict[str, Outcome]:
        """Computes losses and log-probabilities, without gradients. Arguments and errors as in `forward_backward`."""
        return self._run(batches, loss, backward=False)

    def forward_backward(
        self, batches: Mapping[str, Sequence[Example]], loss: str | Loss = "cross_entropy"
    ) -> dict[str, Outcome]:
        """Adds the gradient of the loss to each adapter's own.

        Args:
          batches: examples by adapter.
          loss: a name of `LOSSES` or a function like them.

        Returns:
          An outcome per adapter. Bad data is that adapter's error; a loss that is not finite stops it. Neither changes
          another adapter.

        Raises:
          UnknownAdapterError: a name is not in training.
          ConfigError: the loss is unknown.
        """
        return self._run(batches, loss, backward=True)

    def forward_backward_custom(
        self,
        batches: Mapping[str, Sequence[Example]],
        function: Callable[[str, list[jax.Array]], jax.Array],
    ) -> dict[str, Outcome]:
        """Like `forward_backward`, for a loss that couples tokens or examples, at the cost of a second forward pass.

        Args:
          function: maps an adapter's name and the log-probabilities of its examples to a scalar, in JAX.
        """
        outcomes = self.forward(batches)
        weighted, losses = {}, {}
        for name, outcome in outcomes.items():
            if outcome.error is None:
                value, slopes = jax.value_and_grad(lambda logprobs, name=name: function(name, logprobs))(
                    [jnp.asarray(one) for one in outcome.logprobs]
                )
                losses[name] = float(value)
                weighted[name] = [
                    Example(one.tokens, one.targets, -np.asarray(slope))
                    for one, slope in zip(batches[name], slopes, strict=True)
                ]
        for name, outcome in self.forward_backward(weighted).items():
            loss = losses[name] if outcome.error is None else float("nan")
            outcomes[name] = Outcome(loss, outcome.logprobs, outcome.error)
        return outcomes

    def optim_step(self, names: Iterable[str] | Mapping[str, Adam]) -> dict[str, StepReport]:
        """Applies the gradients of these adapters, and clears them.

        Args:
          names: adapters, each with its own optimizer settings, or with the settings that a mapping gives for this
            step.
        """
        chosen = {name: names[name] if isinstance(names, Mapping) else self._trained(name).optimizer for name in names}
        for name, adam in chosen.items():
            if not isinstance(adam, Adam):
                raise ConfigError(f"optim_step: names[{name!r}]={adam!r}: must be an Adam; or pass a list of names")
        norms = self._norms([self._trained(name) for name in chosen])
        hyper = np.zeros((self.config.max_adapters + 1, len(HYPER)), np.float32)
        reports = {}
        for (name, adam), norm in zip(chosen.items(), norms, strict=True):
            trained = self._trained(name)
            if trained.stopped is None and not np.isfinite(norm):
                trained.stopped = f"the norm of its gradient is {norm}"
            rate = adam.rate(trained.step)
            active = trained.stopped is None
            factor = min(1.0, adam.clip_norm / norm) if active and adam.clip_norm and norm else 1.0
            hyper[trained.slot] = (
                active, True, factor, rate, adam.b1, adam.b2, adam.eps, adam.weight_decay, trained.step
            )  # fmt: skip
            trained.step += active
            reports[name] = StepReport(trained.step, norm, rate, trained.stopped)
        self._update(hyper)
        return reports

    # Inside

    def _trained(self, name: str) -> _Trained:
        if name not in self._adapters:
            raise UnknownAdapterError(f"adapter {name!r} is not in training; in training: {', '.join(self._adapters)}")
        return self._adapters[name]

    def _run(self, batches: Mapping[str, Sequence[Example]], loss: str | Loss, backward: bool) -> dict[str, Outcome]:
        function, needed = _loss(loss, batches)
        outcomes: dict[str, Outcome] = {}
        rows: list[Row] = []
        for name, examples in batches.items():
            error = self._trained(name).stopped or self._refusal(examples, needed)
            outcomes[name] = Outcome(float("nan"), [], error)
            if error is None:
                rows += pack(self._trained(name).slot, examples, self.config)
        results = [
            (micro, self._micro_step(micro, function, backward)) for micro in micro_batches(rows, needed, self.config)
        ]
        self._collect(batches, outcomes, results)
        for name, outcome in outcomes.items():
            if outcome.error is None and not np.isfinite(outcome.loss):
                reason = f"its loss is {outcome.loss}"
                outcomes[name] = Outcome(outcome.loss, outcome.logprobs, reason)
                if backward:
                    self._trained(name).stopped = reason
        self._clear_stopped(batches if backward else ())
        return outcomes

    def _collect(
        self,
        batches: Mapping[str, Sequence[Example]],
        outcomes: dict[str, Outcome],
        results: list[tuple[MicroBatch, tuple[jax.Array, jax.Array]]],
    ) -> None:
        """Reads the micro-steps' results and sums each adapter's loss, in float64, in the order of its examples."""
        names = {self._trained(name).slot: name for name in batches}
        parts: dict[str, list[Any]] = {name: [None] * len(batches[name]) for name in batches}
        for micro, result in results:
            token_loss, logprobs = map(np.asarray, result)
            for slot, number, span in micro.spans():
                parts[names[slot]][number] = token_loss[span], logprobs[span]
        for name, outcome in outcomes.items():
            if outcome.error is None:
                loss = float(sum(token_loss.sum(dtype=np.float64) for token_loss, _ in parts[name]))
                outcomes[name] = Outcome(loss, [logprobs for _, logprobs in parts[name]])

    def _refusal(self, examples: Sequence[Example], needed: tuple[str, ...]) -> str | None:
        """Why an adapter's examples cannot be trained on, or None."""
        if not examples:
            return "examples: must not be empty"
        for number, example in enumerate(examples):
            try:
                example.check(self.model.vocab_size, self.config.lengths[-1], needed)
            except RequestError as error:
                return f"example {number}: {error}"
        return None

    def _micro_step(self, micro: MicroBatch, loss: Loss, backward: bool) -> tuple[jax.Array, jax.Array]:
        """Dispatches a micro-step. Returns each token's loss and log-probability, float32 `[T]`."""
        programs, pool, params = self.programs, self.pool, self.params["layers"]
        layers = range(self.model.num_layers)
        segments = jnp.asarray(micro.segments.reshape(micro.num_rows, micro.length))
        tile_rows = training_tile_rows(self.geometry.layout, programs.dtype, micro.length)
        lora = programs.prepare(pool.table, micro.tiles(tile_rows), tile_rows=tile_rows)
        x, rotary = programs.begin(self._ends, micro.tokens, micro.positions, segments)
        gradients = []
        for layer in layers:
            x, gradient = programs.layer(
                params[layer], pool.master[layer], pool.scales[layer], x, rotary, segments, lora,
                kind=self.model.kind(layer), backward=backward,
            )  # fmt: skip
            gradients.append(gradient)
        token_loss, logprobs, dx = programs.head(
            self._ends, x, micro.targets, micro.inputs, loss=loss, backward=backward
        )
        if backward:
            total = list(pool.gradient)
            for layer in reversed(layers):
                dx, total[layer] = programs.layer_gradient(gradients.pop(), dx, total[layer])
                pool.gradient = tuple(total)
        return token_loss, logprobs

    def _norms(self, adapters: list[_Trained]) -> list[float]:
        """The norm of each adapter's gradient: sums of pages in float32, their sum in float64, in tile order."""
        pool = self.pool
        norms = [self.programs.page_norms(*layer) for layer in zip(pool.gradient, pool.scales, strict=True)]
        pages = np.stack([np.asarray(layer) for layer in norms])  # [num_layers, num_pages]
        return [float(np.sqrt(pages[:, one.pages].sum(dtype=np.float64))) for one in adapters]

    def _clear_stopped(self, names: Iterable[str]) -> None:
        """Clears the gradients of the stopped ones among these adapters."""
        hyper = np.zeros((self.config.max_adapters + 1, len(HYPER)), np.float32)
        for trained in map(self._trained, names):
            hyper[trained.slot, HYPER.index("clear")] = trained.stopped is not None
        if hyper.any():
            self._update(hyper)

    def _update(self, hyper: np.ndarray) -> None:
        """Runs the optimizer's program in every layer; see `HYPER`."""
        page_slot = np.full(self.config.num_pages, self.config.max_adapters, np.int32)
        for trained in self._adapters.values():
            page_slot[trained.pages] = trained.slot
        pool = self.pool
        layers = zip(pool.master, pool.mu, pool.nu, pool.gradient, pool.scales, strict=True)
        updated = [self.programs.update(*arrays, page_slot, hyper) for arrays in layers]
        pool.master, pool.mu, pool.nu, pool.gradient = zip(*updated, strict=True)


def _loss(loss: str | Loss, batches: Mapping[str, Sequence[Example]]) -> tuple[Loss, tuple[str, ...]]:
    """The loss function, and the inputs that each example must give: for a function, those of the first example."""
    if callable(loss):
        first = next((example for examples in batches.values() for example in examples), None)
        return loss, () if first is None else tuple(sorted(first.inputs))
    if loss not in LOSSES:
        raise ConfigError(f"loss={loss!r}: must be one of {', '.join(LOSSES)}, or a function")
    return LOSSES[loss]
