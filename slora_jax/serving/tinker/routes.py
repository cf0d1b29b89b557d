"""Tinker's routes for sessions, results and samples, as the client `tinker` 0.38 needs them, under /api/v1.

POST client/config, client/dynamic_config, telemetry, create_session, session_heartbeat, sessions/ID/finish,
retrieve_future, create_sampling_session, asample; GET healthz, get_server_capabilities, samplers/ID.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax.errors import UnknownAdapterError
from slora_jax.serving.http.access import MayLook, MayServe
from slora_jax.serving.http.errors import JsonResponse
from slora_jax.serving.service import service_of
from slora_jax.serving.tinker.bodies import FutureBody, HeartbeatBody, SampleBody, SamplerBody, SessionBody
from slora_jax.serving.tinker.sampling import sample
from slora_jax.serving.tinker.shared import HasTraining, owner_of
from slora_jax.serving.tinker.states import SCHEME

router = APIRouter(prefix="/api/v1", include_in_schema=False)

CHUNK_SHARE = 0.75
"""Share of `limits.body_bytes` that a client fills with examples, by its own estimate, which leaves out some bytes."""


# Sessions


@router.get("/healthz")
async def healthz(request: Request, training: HasTraining) -> Response:
    """Returns whether requests are accepted."""
    return JsonResponse({"status": "ok"})


@router.get("/get_server_capabilities")
async def capabilities(request: Request, client: MayLook, training: HasTraining) -> Response:
    """Describes the base model."""
    model = {
        "model_name": training.settings.base_name,
        "max_context_length": training.loop.engine.max_model_len,
        "trainable": True,
        "sampleable": True,
    }
    return JsonResponse({"supported_models": [model]})


@router.post("/client/config")
async def client_config(request: Request, client: MayLook) -> Response:
    """Returns the client's settings: a request's examples fit the body limit, and come one request after another."""
    most = int(CHUNK_SHARE * service_of(request).settings.limits.body_bytes)
    return JsonResponse({"parallel_fwdbwd_chunks": False, "fwdbwd_max_chunk_bytes_count": most})


@router.post("/client/dynamic_config")
async def client_dynamic_config(request: Request, client: MayLook) -> Response:
    """Returns the client's changeable settings: none."""
    return JsonResponse({})


@router.post("/telemetry")
async def telemetry(request: Request, client: MayLook) -> Response:
    """Accepts and drops the client's telemetry."""
    return JsonResponse({"status": "accepted"})


@router.post("/create_session")
async def create_session(request: Request, client: MayLook, body: SessionBody, training: HasTraining) -> Response:
    """Creates a session."""
    return JsonResponse({"session_id": training.create_session(owner_of(request, client)).id})


@router.post("/session_heartbeat")
async def session_heartbeat(request: Request, client: MayLook, body: HeartbeatBody, training: HasTraining) -> Response:
    """Keeps a session alive."""
    training.session(body.session_id, owner_of(request, client))
    return JsonResponse({})


@router.post("/sessions/{session_id}/finish")
async def finish_session(request: Request, client: MayLook, session_id: str, training: HasTraining) -> Response:
    """Ends a session."""
    training.end_session(training.session(session_id, owner_of(request, client)))
    return JsonResponse({})


@router.post("/retrieve_future")
async def retrieve_future(request: Request, client: MayLook, body: FutureBody) -> Response:
    """Waits for the result of an operation."""
    training = service_of(request).training
    assert training is not None
    return await training.futures.fetch(body.request_id, owner_of(request, client))


# Sampling


@router.post("/create_sampling_session")
async def create_sampling_session(
    request: Request, client: MayServe, body: SamplerBody, training: HasTraining
) -> Response:
    """Creates a sampler of saved weights or of the base model."""
    session = training.session(body.session_id, owner_of(request, client))
    if body.base_model is not None:
        training.check_base(body.base_model)
    if body.model_path is not None and not (
        body.model_path.startswith(SCHEME) and training.loop.engine.store.has(body.model_path)
    ):
        raise UnknownAdapterError(
            f"adapter {body.model_path!r} is not served; save_weights_for_sampler returns the path of one that is"
        )
    sampler_id = training.add_sampler(session, body.sampling_session_seq_id, body.model_path)
    return JsonResponse({"sampling_session_id": sampler_id})


@router.get("/samplers/{sampler_id}")
async def get_sampler(request: Request, client: MayServe, sampler_id: str, training: HasTraining) -> Response:
    """Describes a sampler."""
    _, adapter = training.sampler(sampler_id, owner_of(request, client))
    return JsonResponse({"sampler_id": sampler_id, "base_model": training.settings.base_name, "model_path": adapter})


@router.post("/asample")
async def asample(request: Request, client: MayServe, body: SampleBody, training: HasTraining) -> Response:
    """Starts to generate samples."""
    service, owner = service_of(request), owner_of(request, client)
    session, adapter = training.sampler(body.sampling_session_id, owner)
    prompt = service.checked(body.prompt.token_ids)
    body.sampling(0, training.loop.engine.max_model_len)  # raises here, for a wrong field
    request_id = f"{body.sampling_session_id}:{body.seq_id}"
    sequences = [f"{request_id}:{index}" for index in range(body.num_samples)]
    if request_id not in training.futures:  # a client that did not receive the answer sends the request again
        async with AsyncExitStack() as held:
            held.enter_context(service.shares.hold(client.name, body.num_samples))
            work = sample(service, client, body, prompt, adapter, held.pop_all())
            training.futures.start(request_id, owner, session.id, work)
    return JsonResponse({"request_id": request_id, "sample_sequence_ids": sequences})
