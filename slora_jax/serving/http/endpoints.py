"""OpenAI's endpoints, vLLM's two for adapters, and the probes.

POST /v1/completions, /v1/chat/completions, /v1/load_lora_adapter, /v1/unload_lora_adapter;
GET /v1/models, /v1/models/NAME, /v1/adapters, /health, /ready, /metrics.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from slora_jax.serving.health import Health
from slora_jax.serving.http import answers
from slora_jax.serving.http.access import Client, MayLook, MayManage, MayServe
from slora_jax.serving.http.bodies import ChatBody, CompletionBody, Generation, LoadBody, StreamOptions, UnloadBody
from slora_jax.serving.http.chat import prompt_of
from slora_jax.serving.http.errors import JsonResponse
from slora_jax.serving.http.forms import form_of
from slora_jax.serving.http.generation import ClientGoneError, on_disconnect, respond
from slora_jax.serving.http.openapi import GENERATING, MANAGING, answers_of, errors_of
from slora_jax.serving.http.shapes import ChatShape, CompletionShape, Shape
from slora_jax.serving.mailbox import Mailbox
from slora_jax.serving.service import Service, generating_service_of, service_of

router = APIRouter()
generating = APIRouter()
"""Routes that any HTTP process answers."""


@generating.post("/v1/completions", responses=answers_of(answers.Completion, *GENERATING, stream=True))
async def completions(request: Request, client: MayServe, body: CompletionBody) -> Response:
    """Continues each prompt, `n` times."""
    service = generating_service_of(request)
    async with AsyncExitStack() as held:
        admission = await service.admit(held, client.name, body.model, len(body.prompts) * body.choices)
        prompts = _each(await service.token_ids(body.prompts), body.choices)
        texts = [service.text(one) if body.echo else "" for one in body.prompts]
        shape = CompletionShape(
            body.model or service.settings.base_name,
            service.token_text,
            prompts,
            echoes=_each(texts, body.choices),
            logprobs=body.logprobs is not None,
            token_ids=body.return_token_ids,
            prompt_logprobs=body.prompt_logprobs is not None,
        )
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        return await _answer(request, client, body, shape, held, admission, max_tokens, body.logprobs, body.forms)


@generating.post("/v1/chat/completions", responses=answers_of(answers.ChatCompletion, *GENERATING, stream=True))
async def chat_completions(request: Request, client: MayServe, body: ChatBody) -> Response:
    """Answers a conversation, put into the model's chat template, `n` times."""
    service = generating_service_of(request)
    async with AsyncExitStack() as held:
        admission = await service.admit(held, client.name, body.model, body.choices)
        prompt, tools = await service.of_text(prompt_of, service, body)
        prompts = [prompt] * body.choices
        shape = ChatShape(
            body.model or service.settings.base_name,
            service.token_text,
            prompts,
            logprobs=bool(body.logprobs),
            token_ids=body.return_token_ids,
            prompt_logprobs=body.prompt_logprobs is not None,
            tools=tools,
        )
        max_tokens = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        forms = body.forms if tools is None else tools.forms
        return await _answer(request, client, body, shape, held, admission, max_tokens, logprobs, forms)


@router.get("/v1/models", responses=answers_of(answers.ModelList, 401, 503))
async def models(request: Request, client: MayLook) -> Response:
    """Lists the base model and every adapter."""
    service = service_of(request)
    base = service.settings.base_name
    root = _model(service, base)
    root["max_model_len"] = service.loop.engine.longest_request()
    data = [root, *(_model(service, info.name, base) for info in service.loop.engine.store.infos())]
    answer: answers.ModelList = {"object": "list", "data": data}
    return JsonResponse(answer)


@router.get("/v1/models/{name:path}", responses=answers_of(answers.Model, 401, 404, 503))
async def model(request: Request, client: MayLook, name: str) -> Response:
    """Returns the base model or one adapter."""
    service = service_of(request)
    parent = None if service.adapter_named(name) is None else service.settings.base_name
    return JsonResponse(_model(service, name, parent))


@router.post("/v1/load_lora_adapter", responses=answers_of(answers.Loaded, *MANAGING))
async def load_lora_adapter(request: Request, client: MayManage, body: LoadBody) -> Response:
    """Registers a PEFT directory inside the configured ones, now and at the next start."""
    service = service_of(request)
    info = await service.adapters.load(service.loop, body.lora_name, body.lora_path, body.load_inplace)
    loaded: answers.Loaded = {
        "message": f"Success: LoRA adapter '{info.name}' added successfully.",
        "name": info.name,
        "digest": info.digest,
        "rank": info.rank,
        "pages": info.num_pages,
        "bytes": info.nbytes,
    }
    return JsonResponse(loaded)


@router.post("/v1/unload_lora_adapter", responses=answers_of(answers.Unloaded, *MANAGING))
async def unload_lora_adapter(request: Request, client: MayManage, body: UnloadBody) -> Response:
    """Rejects new requests for the adapter, waits until those under way have ended, and reports the memory freed."""
    service = service_of(request)
    seconds = service.settings.drain_seconds if body.drain_seconds is None else body.drain_seconds
    return JsonResponse(await service.adapters.unload(service.loop, body.lora_name, seconds))


@router.get("/v1/adapters", responses=answers_of(answers.AdapterList, 400, 401, 503))
async def adapters(
    request: Request, client: MayLook, limit: Annotated[int | None, Query(ge=0)] = None, search: str = ""
) -> Response:
    """Lists registered adapters, last used first: where each is, how large, how long its requests waited. `limit`: the
    most to list; `search`: only those with this text in their name or digest. `refused`: adapters of the watched
    directory that cannot be used, and why."""
    service = service_of(request)
    total, data = list_adapters(service, limit, search.lower())
    answer: answers.AdapterList = {"object": "list", "total": total, "data": data, "refused": service.adapters.refused}
    return JsonResponse(answer)


@router.get("/health", responses=answers_of(answers.EngineHealth) | {503: {"model": answers.EngineHealth}})
async def health(request: Request) -> Response:
    """Returns whether the process is worth keeping: 503 if its engine is dead, or a call of it does not return."""
    loop = service_of(request).loop
    answer: answers.EngineHealth = {"status": str(loop.health), "error": repr(loop.error) if loop.error else None}
    return JsonResponse(answer, 503 if loop.health in (Health.DEAD, Health.STALLED) else 200)


@router.get("/metrics", response_class=Response, responses=errors_of(401) | {200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, client: MayLook) -> Response:
    """Returns the metrics for Prometheus."""
    text, content_type = await asyncio.to_thread(service_of(request).metrics.render)
    return Response(text, media_type=content_type)


@router.get("/ready", responses=answers_of(answers.Readiness) | {503: {"model": answers.Readiness}})
async def ready(request: Request) -> Response:
    """Returns whether requests are accepted: everything is loaded, compiled and warm, no fault, not stopping."""
    service = service_of(request)
    answer: answers.Readiness = {"status": "stopping" if service.is_draining else str(service.loop.health)}
    return JsonResponse(answer, 200 if service.is_ready else 503)


async def _answer(
    request: Request,
    client: Client,
    body: Generation,
    shape: Shape,
    held: AsyncExitStack,
    admission: str | int | None,
    max_tokens: int | None,
    logprobs: int | None,
    forms: Mapping[str, dict[str, Any]],
) -> Response:
    service, prompts = generating_service_of(request), shape.prompts
    of_prompt = body.prompt_logprobs
    if of_prompt is None and isinstance(body, CompletionBody) and body.echo:
        of_prompt = logprobs
    form = await form_of(service, forms)
    rooms = [service.engine.max_model_len - len(prompt) for prompt in prompts]
    params = [
        body.sampling(index % body.choices, max_tokens and min(max_tokens, room), logprobs, of_prompt, form)
        for index, room in enumerate(rooms)
    ]
    mailbox = Mailbox()
    held.callback(on_disconnect(request.receive, lambda: mailbox.fail(ClientGoneError())).cancel)
    tenant = client.name if service.settings.tenants == "client" else ""
    stream = (body.stream_options or StreamOptions()) if body.stream else None
    priority, is_streamed = body.priority or 0, stream is not None
    service.start(held, prompts, params, admission, tenant, mailbox, priority, is_streamed=is_streamed)
    answer = await respond(mailbox, shape, body.choices, stream, held)
    if max_tokens is not None and max_tokens > min(rooms):
        answer.headers["X-Max-Tokens-Lowered-To"] = str(min(rooms))
    return answer


def _each[T](items: list[T], choices: int) -> list[T]:
    """Repeats each item for its choices, which are neighbours."""
    return [item for item in items for _ in range(choices)]


def _model(service: Service, name: str, parent: str | None = None) -> answers.Model:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "slora-jax",
        "root": parent or name,
        "parent": parent,
    }


def list_adapters(service: Service, limit: int | None, search: str) -> tuple[int, list[answers.Adapter]]:
    """Returns how many registered adapters have `search` in their name (in lower case) or digest, and the `limit` of
    them that were used last; unused ones come at the end in order of registration."""
    store, tally = service.loop.engine.store, service.metrics.adapters
    tiers, infos = store.tiers(), store.infos()
    device = {} if service.loop.snapshot is None else service.loop.snapshot.device
    names: defaultdict[str, list[str]] = defaultdict(list)
    for info in infos:
        names[info.digest].append(info.name)
    found = [info for info in infos if search in info.name.lower() or search in info.digest]
    found.sort(key=lambda info: tally.of(info.name).last_used or 0.0, reverse=True)
    entries: list[answers.Adapter] = []
    for info in found[:limit]:
        usage = tally.of(info.name)
        entries.append(
            {
                "name": info.name,
                "digest": info.digest,
                "aliases": [name for name in names[info.digest] if name != info.name],
                "rank": info.rank,
                "pages": info.num_pages,
                "bytes": info.nbytes,
                "state": device.get(info.digest) or tiers.get(info.digest, "disk"),
                "last_used": usage.last_used,
                "requests": usage.requests,
                "prompt_tokens": usage.prompt_tokens,
                "generated_tokens": usage.generated_tokens,
                "queue_seconds_mean": usage.queue_seconds / usage.queued if usage.queued else None,
                "queue_seconds_last": usage.last_queue_seconds,
            }
        )
    return len(found), entries
