"""POST /v1/completions, POST /v1/chat/completions, GET /v1/models."""

from __future__ import annotations

import inspect
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax.engine.arrival import text_ids
from slora_jax.serving.access import Client
from slora_jax.serving.errors import ApiError, JsonResponse
from slora_jax.serving.generation import Sequences, generate
from slora_jax.serving.protocol import ChatBody, CompletionBody, Generation, StreamOptions
from slora_jax.serving.schemas import GENERATING, ChatCompletion, Completion, Model, ModelList, answers
from slora_jax.serving.service import MayLook, MayServe, Service, service_of
from slora_jax.serving.shapes import ChatShape, CompletionShape, Shape

router = APIRouter(prefix="/v1")


@router.post("/completions", responses=answers(Completion, *GENERATING, stream=True))
async def completions(request: Request, client: MayServe, body: CompletionBody) -> Response:
    """Continues each prompt, `n` times."""
    service = service_of(request)
    adapter = service.open_for(body.model)
    async with AsyncExitStack() as held:
        held.enter_context(service.shares.hold(client.name, len(body.prompts) * body.choices))
        prompts = await service.token_ids(body.prompts)
        each = [prompt for prompt in prompts for _ in range(body.choices)]
        echoes = [""] * len(each)
        if body.echo:
            texts = [service.text(one) for one in body.prompts]
            echoes = [text for text in texts for _ in range(body.choices)]
        shape = CompletionShape(
            body.model or service.settings.base_name,
            service.token_text,
            logprobs=body.logprobs is not None,
            token_ids=body.return_token_ids,
            prompt_logprobs=body.prompt_logprobs is not None,
            echoes=echoes,
            prompts=each,
        )
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        return await _answer(service, client, request, body, each, max_tokens, body.logprobs, shape, adapter, held)


@router.post("/chat/completions", responses=answers(ChatCompletion, *GENERATING, stream=True))
async def chat_completions(request: Request, client: MayServe, body: ChatBody) -> Response:
    """Answers a conversation, put into the model's chat template, `n` times."""
    service = service_of(request)
    adapter = service.open_for(body.model)
    async with AsyncExitStack() as held:
        held.enter_context(service.shares.hold(client.name, body.choices))
        prompts = [await service.of_text(_render, service, body)] * body.choices
        shape = ChatShape(
            body.model or service.settings.base_name,
            service.token_text,
            logprobs=bool(body.logprobs),
            token_ids=body.return_token_ids,
            prompt_logprobs=body.prompt_logprobs is not None,
            prompt=prompts[0],
        )
        max_tokens = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await _answer(service, client, request, body, prompts, max_tokens, logprobs, shape, adapter, held)


@router.get("/models", responses=answers(ModelList, 401, 503))
async def models(request: Request, client: MayLook) -> Response:
    """The base model and every adapter."""
    service = service_of(request)
    base = service.settings.base_name
    data = [_model(base, service.started, None, {"max_model_len": service.loop.engine.longest_request()})]
    data += [_model(info.name, service.started, base, {}) for info in service.loop.engine.store.infos()]
    return JsonResponse({"object": "list", "data": data})


@router.get("/models/{name:path}", responses=answers(Model, 401, 404, 503))
async def model(request: Request, client: MayLook, name: str) -> Response:
    """One of them."""
    service = service_of(request)
    adapter = service.adapter_named(name)
    base = service.settings.base_name
    return JsonResponse(_model(name, service.started, None if adapter is None else base, {}))


async def _answer(
    service: Service,
    client: Client,
    request: Request,
    body: Generation,
    prompts: list[list[int]],
    max_tokens: int | None,
    logprobs: int | None,
    shape: Shape,
    adapter: str | None,
    held: AsyncExitStack,
) -> Response:
    of_prompt = body.prompt_logprobs
    if of_prompt is None and isinstance(body, CompletionBody) and body.echo:
        of_prompt = logprobs
    rooms = [service.loop.engine.max_model_len - len(prompt) for prompt in prompts]
    params = [
        body.sampling(index % body.choices, max_tokens and min(max_tokens, room), logprobs, of_prompt)
        for index, room in enumerate(rooms)
    ]
    tenant = client.name if service.settings.tenants == "client" else ""
    stream = (body.stream_options or StreamOptions()) if body.stream else None
    sequences = Sequences(prompts, params, adapter, tenant, body.choices)
    answer = await generate(request, sequences, shape, stream, service.loop, held)
    if max_tokens is not None and max_tokens > min(rooms):
        answer.headers["X-Max-Tokens-Lowered-To"] = str(min(rooms))
    return answer


def _render(service: Service, body: ChatBody) -> list[int]:
    """The conversation as the model's chat template writes it, in tokens.

    Raises:
      ApiError: there is no template, or it refuses the conversation.
    """
    tokenizer = service.loop.engine.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ApiError(400, "the model has no chat template; use /v1/completions", code="no_chat_template")
    variables = body.chat_template_kwargs or {}
    for name in inspect.signature(tokenizer.apply_chat_template).parameters:
        if name in variables:  # another template, say, which could run for ever
            message = f"chat_template_kwargs.{name} cannot be set"
            raise ApiError(400, message, code="invalid_value", param="chat_template_kwargs")
    try:
        text = tokenizer.apply_chat_template(
            [message.for_template() for message in body.messages],
            tokenize=False,
            add_generation_prompt=body.add_generation_prompt,
            **variables,
        )
    except Exception as error:
        message = f"the chat template refuses the messages: {error}"
        raise ApiError(400, message, code="invalid_value", param="messages") from error
    longest = service.loop.engine.max_model_len
    ids = text_ids(text, tokenizer, longest, add_special_tokens=False)  # the template has written them
    return service.checked(ids)


def _model(name: str, created: int, parent: str | None, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "slora-jax",
        "root": parent or name,
        "parent": parent,
        **more,
    }
