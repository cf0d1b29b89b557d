"""Tinker's routes for models, as the client `tinker` 0.38 needs them, under /api/v1.

POST create_model, get_info, forward_backward, optim_step, save_weights, load_weights, save_weights_for_sampler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from google.protobuf.message import DecodeError
from starlette.responses import Response

from slora_jax.adapters import LoraConfig
from slora_jax.errors import AdapterError
from slora_jax.serving.http.access import MayTrain
from slora_jax.serving.http.errors import ApiError, JsonResponse, unavailable
from slora_jax.serving.tinker.bodies import (
    CreateModelBody,
    InfoBody,
    LoadStateBody,
    OptimStepBody,
    SaveSamplerBody,
    SaveStateBody,
)
from slora_jax.serving.tinker.datums import Limits, encode_result, read_pass
from slora_jax.serving.tinker.messages import ForwardBackwardRequest
from slora_jax.serving.tinker.operations import Call, Pass, Step
from slora_jax.serving.tinker.shared import HasTraining, owner_of
from slora_jax.serving.tinker.training import Model, Session, Training
from slora_jax.training import Adam, Trainer

router = APIRouter(prefix="/api/v1", include_in_schema=False)


@router.post("/create_model")
async def create_model(request: Request, client: MayTrain, body: CreateModelBody, training: HasTraining) -> Response:
    """Creates an adapter in training."""
    session = training.session(body.session_id, owner_of(request, client))
    training.check_base(body.base_model)
    lora = body.lora_config
    if lora.train_unembed:
        message = (
            "lora_config.train_unembed=True (the client's default): adapters of the output head are not supported; "
            "pass train_unembed=False to create_lora_training_client"
        )
        raise ApiError(400, message, code="not_supported", param="lora_config.train_unembed")
    if not (lora.train_mlp or lora.train_attn):
        message = "lora_config: train_mlp and train_attn are both False; at least one must be True"
        raise ApiError(400, message, code="invalid_value", param="lora_config")

    def add(trainer: Trainer, name: str) -> None:
        trainer.add(name, lora.config(), seed=lora.seed or 0)

    return JsonResponse(_create(training, session, body.model_seq_id, lora.config(), add))


@router.post("/get_info")
async def get_info(request: Request, client: MayTrain, body: InfoBody, training: HasTraining) -> Response:
    """Describes a model. A client on this machine finds the tokenizer in the model's directory."""
    model = training.model(body.model_id, owner_of(request, client))
    settings = training.settings
    has_directory = settings.is_loopback and settings.model_dir.is_dir()
    data = {
        "model_name": settings.base_name,
        "tokenizer_id": str(settings.model_dir.resolve()) if has_directory else None,
    }
    info = {"model_id": model.id, "model_data": data, "is_lora": True, "lora_rank": model.lora.r}
    return JsonResponse(info | {"model_name": settings.base_name})


@router.post("/forward_backward")
async def forward_backward(request: Request, client: MayTrain, training: HasTraining) -> Response:
    """Computes losses and log-probabilities of examples and, unless only that is asked for, adds to the gradient."""
    data = await request.body()
    try:
        message = await asyncio.to_thread(ForwardBackwardRequest.FromString, data)
    except DecodeError as error:
        raise ApiError(400, f"the body is not a ForwardBackwardRequest: {error}", code="bad_protobuf") from None
    model = training.model(message.model_id, owner_of(request, client))
    if training.queued_bytes + len(data) > training.settings.limits.bodies_bytes:
        raise unavailable("too many examples wait to be trained", code="bodies_full", retry_after=1)
    training.queued_bytes += len(data)
    return JsonResponse(training.start(model, message.seq_id, _pass(training, model, message, len(data))))


async def _pass(training: Training, model: Model, message: Any, nbytes: int) -> bytes:
    try:
        config = training.trainer.config
        limits = Limits(training.loop.engine.model.vocab_size, config.lengths[-1])
        examples, loss = read_pass(message, limits)
        part = Pass(examples, loss, not message.forward_only, config.tokens[-1])
        return encode_result(*await training.submit(model.id, part))
    finally:
        training.queued_bytes -= nbytes


@router.post("/optim_step")
async def optim_step(request: Request, client: MayTrain, body: OptimStepBody, training: HasTraining) -> Response:
    """Applies the gradient, and clears it."""
    model, given = training.model(body.model_id, owner_of(request, client)), body.adam_params
    adam = Adam(
        given.learning_rate, given.beta1, given.beta2, given.eps, given.weight_decay, clip_norm=given.grad_clip_norm
    )

    async def step() -> dict:
        report = await training.submit(model.id, Step(adam))
        return {"metrics": {name: float(getattr(report, name)) for name in ("step", "grad_norm", "learning_rate")}}

    return JsonResponse(training.start(model, body.seq_id, step()))


# Saved weights


@router.post("/save_weights")
async def save_weights(request: Request, client: MayTrain, body: SaveStateBody, training: HasTraining) -> Response:
    """Writes the weights and the optimizer's state to disk."""
    model = training.model(body.model_id, owner_of(request, client))
    path = training.states.path(model.id, body.path, overwrite=body.overwrite)

    async def save() -> dict:
        adapter, state = await training.submit(
            model.id, Call(lambda _, trainer: (trainer.adapter(model.id), trainer.state(model.id)))
        )
        await asyncio.to_thread(training.states.save, path, adapter, state, training.settings.base_name)
        return {"path": path}

    return JsonResponse(training.start(model, body.seq_id, save()))


@router.post("/load_weights")
async def load_weights(request: Request, client: MayTrain, body: LoadStateBody, training: HasTraining) -> Response:
    """Reads a saved state into a model, or into a new one."""
    owner = owner_of(request, client)
    if body.base_model is not None:
        training.check_base(body.base_model)
    saved = await asyncio.to_thread(training.states.load, body.path, with_optimizer=body.optimizer)

    def add(trainer: Trainer, name: str) -> None:
        trainer.add(name, saved.directory)
        try:
            if saved.optimizer is not None:
                trainer.restore(name, saved.optimizer)
        except (KeyError, TypeError, ValueError) as error:
            trainer.remove(name)
            raise AdapterError(f"{body.path}: its optimizer state is damaged: {error!r}") from error

    if body.session_id is not None and body.model_seq_id is not None:
        session = training.session(body.session_id, owner)
        return JsonResponse(_create(training, session, body.model_seq_id, saved.lora, add))
    model = training.model(body.model_id or "", owner)

    def replace(trainer: Trainer) -> None:
        if saved.lora.r != model.lora.r or saved.lora.target_modules != model.lora.target_modules:
            raise AdapterError(f"{body.path} has another rank or other projections than the model; create one from it")
        trainer.remove(model.id)
        add(trainer, model.id)

    async def load() -> dict:
        await training.submit(model.id, Call(lambda _, trainer: replace(trainer)))
        return {"path": body.path, "model_id": model.id}

    return JsonResponse(training.start(model, body.seq_id or 0, load()))


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    request: Request, client: MayTrain, body: SaveSamplerBody, training: HasTraining
) -> Response:
    """Serves the present weights under a name that no later weights get."""
    model = training.model(body.model_id, owner_of(request, client))
    if (body.path is None) == (body.sampling_session_seq_id is None):
        raise ApiError(400, "give one of path and sampling_session_seq_id", code="invalid_value", param="path")
    path = None if body.path is None else training.sampler_path(model, body.path)

    async def save() -> dict:
        if path is not None:
            await training.publish(model, path)
            return {"path": path}
        assert body.sampling_session_seq_id is not None
        name = await training.publish_snapshot(model, body.seq_id)
        return {"sampling_session_id": training.add_sampler(model.session, body.sampling_session_seq_id, name)}

    return JsonResponse(training.start(model, body.seq_id, save()))


def _create(
    training: Training, session: Session, number: int, lora: LoraConfig, add: Callable[[Trainer, str], None]
) -> dict[str, str]:
    """Starts to create a model, and returns the promise.

    Args:
      add: adds the model to the trainer; called with the trainer and the model's id, on the engine's thread.
    """
    model_id = training.new_model_id(session, number)
    request_id = f"{model_id}:0"

    async def create() -> dict:
        await training.submit(model_id, Call(lambda _, trainer: add(trainer, model_id)))
        training.add_model(model_id, session, lora)
        return {"model_id": model_id}

    if request_id not in training.futures:
        training.futures.start(request_id, session.owner, session.id, create())
    return {"request_id": request_id, "model_id": model_id}
