"""OpenAI's endpoint for embeddings: POST /v1/embeddings."""

from __future__ import annotations

from base64 import b64encode
from contextlib import AsyncExitStack

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax.engine.outputs import embeddings
from slora_jax.scheduling import SamplingParams
from slora_jax.serving.http import answers
from slora_jax.serving.http.access import MayServe
from slora_jax.serving.http.bodies import EmbeddingBody
from slora_jax.serving.http.errors import ApiError, JsonResponse
from slora_jax.serving.http.generation import ClientGoneError, on_disconnect, outputs_of
from slora_jax.serving.http.openapi import GENERATING, answers_of
from slora_jax.serving.mailbox import Mailbox
from slora_jax.serving.service import GeneratingService, generating_service_of

router = APIRouter()


@router.post("/v1/embeddings", responses=answers_of(answers.Embeddings, *GENERATING))
async def embed(request: Request, client: MayServe, body: EmbeddingBody) -> Response:
    """Returns an embedding of each input: its pooled hidden states after the final norm, with the model's adapter."""
    service = generating_service_of(request)
    async with AsyncExitStack() as held:
        admission = await service.admit(held, client.name, body.model, len(body.inputs))
        check_served(service, body)
        prompts = await service.token_ids(body.inputs)
        mailbox = Mailbox()
        held.callback(on_disconnect(request.receive, lambda: mailbox.fail(ClientGoneError())).cancel)
        params = SamplingParams(max_tokens=1, prompt_embedding=body.pooling or "last")
        tenant = client.name if service.settings.tenants == "client" else ""
        service.start(held, prompts, [params] * len(prompts), admission, tenant, mailbox)
        try:
            outputs = await outputs_of(mailbox, len(prompts))
        except ClientGoneError:
            return Response(status_code=499)  # for the log only
    vectors = embeddings(outputs, body.normalize is not False)
    count = sum(map(len, prompts))
    answer: answers.Embeddings = {
        "object": "list",
        "model": body.model or service.settings.base_name,
        "data": [_entry(i, vector, body.encoding_format == "base64") for i, vector in enumerate(vectors)],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return JsonResponse(answer)


def check_served(service: GeneratingService, body: EmbeddingBody) -> None:
    """Raises ApiError if the server has no programs for embeddings, or they have another size."""
    engine = service.engine
    if not engine.config.embeddings:
        message = "embeddings are not served; start the server with --embeddings"
        raise ApiError(404, message, code="not_served")
    size = engine.model.hidden_size
    if body.dimensions not in (None, size):
        message = f"dimensions={body.dimensions}: must be {size}, the model's hidden size; leave it out"
        raise ApiError(400, message, code="invalid_value", param="dimensions")


def _entry(index: int, vector: np.ndarray, in_base64: bool) -> answers.Embedding:
    numbers = b64encode(vector.astype("<f4").tobytes()).decode() if in_base64 else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": numbers}
