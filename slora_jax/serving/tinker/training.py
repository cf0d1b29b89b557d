"""Clients' sessions, models and samplers, and the operations on them."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from slora_jax.adapters import LoraConfig
from slora_jax.engine import Engine
from slora_jax.errors import SloraError, UnknownAdapterError
from slora_jax.serving.engine_loop import EngineLoop
from slora_jax.serving.http.errors import ApiError
from slora_jax.serving.settings import ServerSettings, TrainSettings
from slora_jax.serving.tinker.futures import Futures
from slora_jax.serving.tinker.operations import Call, Operation, OperationQueue
from slora_jax.serving.tinker.states import SCHEME, StateDirectory, check_name
from slora_jax.training import Trainer

logger = logging.getLogger("slora_jax.serving")

SWEEP_SECONDS = 10.0
"""Interval at which ended sessions and fetched results are dropped."""
PARTS_PER_TURN = 4
"""A turn of the engine's loop trains at most about as many full micro-steps."""


@dataclass(eq=False)
class Session:
    """A client's session.

    Attributes:
      seen: when the client was last heard of, on the monotonic clock.
      models: ids of its models.
      samplers: adapter of each of its samplers by id, None for the base model.
    """

    id: str
    owner: str
    seen: float = field(default_factory=time.monotonic)
    models: list[str] = field(default_factory=list)
    samplers: dict[str, str | None] = field(default_factory=dict)


@dataclass(eq=False)
class Model:
    """An adapter in training; its id is its name in the trainer.

    Attributes:
      last: number of its last operation.
      snapshots: names under which its unnamed weights are served, oldest first.
    """

    id: str
    session: Session
    lora: LoraConfig
    last: int = 0
    snapshots: deque[str] = field(default_factory=deque)


class Training:
    """Everything of Tinker's API but HTTP. Lives in the event loop, except for `make_trainer`."""

    def __init__(self, settings: ServerSettings, train: TrainSettings, loop: EngineLoop) -> None:
        self.settings, self.train, self.loop = settings, train, loop
        self.futures = Futures()
        self.states = StateDirectory(train.state_dir)
        self.queue = OperationQueue(loop, lambda: self.trainer, PARTS_PER_TURN * train.tokens[-1])
        self.queued_bytes = 0  # of passes that have not ended
        self._background: set[asyncio.Task] = set()
        self._trainer: Trainer | None = None
        self._sessions: dict[str, Session] = {}
        self._models: dict[str, Model] = {}

    @property
    def trainer(self) -> Trainer:
        """The trainer, which exists once requests are accepted."""
        assert self._trainer is not None
        return self._trainer

    def make_trainer(self, engine: Engine) -> None:
        """Creates the trainer, on the engine's thread. Raises ConfigError if the settings do not fit the engine."""
        from slora_jax.serving.tinker.sizes import make_trainer

        self._trainer = make_trainer(engine, self.train)

    async def run(self) -> None:
        """Runs operations, and drops what clients left behind, until it is cancelled."""
        operations = asyncio.create_task(self.queue.run())
        try:
            while True:
                await asyncio.sleep(SWEEP_SECONDS)
                self.futures.sweep()
                for session in list(self._sessions.values()):
                    idle = time.monotonic() - session.seen > self.train.session_seconds
                    if idle and not self.futures.is_busy(session.id):
                        logger.info("session %s has ended: no sign of its client", session.id)
                        self.end_session(session)
        finally:
            operations.cancel()

    # Sessions

    def create_session(self, owner: str) -> Session:
        """Creates a session."""
        session = Session(str(uuid.uuid4()), owner)
        self._sessions[session.id] = session
        return session

    def session(self, session_id: str, owner: str) -> Session:
        """Returns a session, and notes the sign of its client. Raises ApiError 410 if the owner has no such session."""
        session = self._sessions.get(session_id)
        if session is None or session.owner != owner:
            message = f"session_id={session_id!r}: there is no such session, or it has ended; create a new one"
            raise ApiError(410, message, code="no_such_session", param="session_id")
        session.seen = time.monotonic()
        return session

    def end_session(self, session: Session) -> None:
        """Ends a session: removes its models and unnamed sampler weights. Saved ones stay."""
        del self._sessions[session.id]
        self.futures.end(session.id)
        for model_id in session.models:
            model = self._models.pop(model_id, None)
            if model is not None:
                for name in model.snapshots:
                    self._in_background(self._unload(name))
                self._in_background(self.submit(model_id, _removal(model_id)))

    # Models

    def new_model_id(self, session: Session, number: int) -> str:
        """Returns the id of a session's model, by the rule that the client knows."""
        return f"{session.id}:train:{number}"

    def model(self, model_id: str, owner: str) -> Model:
        """Returns a model. Raises ApiError 404 if the owner has no such model."""
        model = self._models.get(model_id)
        if model is None or model.session.owner != owner:
            message = f"model_id={model_id!r}: there is no such model, or its session has ended"
            raise ApiError(404, message, code="no_such_model", param="model_id")
        model.session.seen = time.monotonic()
        return model

    def add_model(self, model_id: str, session: Session, lora: LoraConfig) -> None:
        """Registers a model that the trainer has."""
        self._models[model_id] = Model(model_id, session, lora)
        session.models.append(model_id)

    def check_base(self, base_model: str) -> None:
        """Raises ApiError unless this is the served base model."""
        if base_model != self.settings.base_name:
            message = f"base_model={base_model!r}: this server's base model is {self.settings.base_name!r}"
            raise ApiError(404, message, code="model_not_found", param="base_model")

    def start(self, model: Model, number: int, work: Coroutine[Any, Any, bytes | dict]) -> dict[str, str]:
        """Starts an operation of a model, and returns the promise of its result.

        A client that did not receive the promise sends the operation again; it does not run twice.

        Args:
          number: the operation's number within the model.

        Raises:
          ApiError: the number was used already, and its result is gone.
        """
        request_id = f"{model.id}:{number}"
        if request_id in self.futures:
            work.close()
        elif number <= model.last:
            work.close()
            message = f"seq_id={number}: is not above {model.last}, the last one of this model"
            raise ApiError(400, message, code="invalid_value", param="seq_id")
        else:
            model.last = number
            self.futures.start(request_id, model.session.owner, model.session.id, work)
        return {"request_id": request_id, "model_id": model.id}

    async def submit(self, model_id: str, operation: Operation) -> Any:
        """Runs an operation after the model's earlier ones, and returns its result."""
        return await self.queue.submit(model_id, operation)

    # Samplers

    async def publish(self, model: Model, served_name: str) -> None:
        """Serves a model's present weights under a new name. Raises ApiError if the name is in use."""

        def publish(engine: Engine, trainer: Trainer) -> None:
            if engine.store.has(served_name):
                message = f"{served_name} exists: saved sampler weights never change; choose another name"
                raise ApiError(400, message, code="name_taken", param="path")
            trainer.publish(engine, model.id, served_name)

        await self.submit(model.id, Call(publish))

    async def publish_snapshot(self, model: Model, number: int) -> str:
        """Serves a model's present weights under a name of their own, and returns it. The oldest one beyond
        `train.snapshots` is unloaded."""
        name = f"{SCHEME}{model.id}/snapshots/{number}"
        await self.publish(model, name)
        model.snapshots.append(name)
        if len(model.snapshots) > self.train.snapshots:
            await self._unload(model.snapshots.popleft())
        return name

    def sampler_path(self, model: Model, name: str) -> str:
        """Returns the path of named sampler weights, which is also the name under which they are served."""
        return f"{SCHEME}{model.id}/sampler_weights/{check_name(name, 'path')}"

    def add_sampler(self, session: Session, number: int, adapter: str | None) -> str:
        """Creates a sampler of an adapter (None: of the base model), and returns its id."""
        sampler_id = f"{session.id}:sample:{number}"
        session.samplers[sampler_id] = adapter
        return sampler_id

    def sampler(self, sampler_id: str, owner: str) -> tuple[Session, str | None]:
        """Returns a sampler's session and adapter.

        Raises:
          ApiError: 404, there is no such sampler; 410, its session has ended.
          UnknownAdapterError: its weights are not served any more.
        """
        session = self.session(sampler_id.partition(":")[0], owner)
        if sampler_id not in session.samplers:
            message = f"sampling_session_id={sampler_id!r}: there is no such sampler"
            raise ApiError(404, message, code="no_such_sampler", param="sampling_session_id")
        adapter = session.samplers[sampler_id]
        if adapter is not None and not self.loop.engine.store.has(adapter):
            kept = f"; of unnamed weights, a model's last {self.train.snapshots} are kept (train.snapshots)"
            raise UnknownAdapterError(f"adapter {adapter!r} is not served any more{kept}")
        return session, adapter

    # Internal

    async def _unload(self, name: str) -> None:
        if self.loop.engine.store.has(name):
            await self.loop.call(lambda engine: engine.unload_adapter(name))

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        async def logged() -> None:
            try:
                await work
            except (ApiError, SloraError) as error:
                logger.warning("a session's end left something behind: %s", error)

        task = asyncio.create_task(logged())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _removal(model_id: str) -> Call:
    return Call(lambda _, trainer: trainer.remove(model_id))
