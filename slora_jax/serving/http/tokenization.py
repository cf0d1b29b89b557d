"""vLLM's endpoints for tokenization: POST /tokenize, /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax.engine.arrival import prompt_ids, text_ids
from slora_jax.errors import RequestError
from slora_jax.serving.http import answers
from slora_jax.serving.http.access import MayServe
from slora_jax.serving.http.bodies import DetokenizeBody, TokenizeBody
from slora_jax.serving.http.chat import rendered
from slora_jax.serving.http.errors import JsonResponse
from slora_jax.serving.http.openapi import GENERATING, answers_of
from slora_jax.serving.service import GeneratingService, generating_service_of

router = APIRouter()


@router.post("/tokenize", responses=answers_of(answers.Tokenized, *GENERATING))
async def tokenize(request: Request, client: MayServe, body: TokenizeBody) -> Response:
    """Returns the token ids of a prompt, or of a conversation in the model's chat template."""
    service = generating_service_of(request)
    await service.check_model(body.model)
    return JsonResponse(await service.of_text(_tokenized, service, body))


@router.post("/detokenize", responses=answers_of(answers.Detokenized, *GENERATING))
async def detokenize(request: Request, client: MayServe, body: DetokenizeBody) -> Response:
    """Returns the text of token ids, with special tokens."""
    service = generating_service_of(request)
    await service.check_model(body.model)
    return JsonResponse(await service.of_text(_detokenized, service, body.tokens))


def _tokenized(service: GeneratingService, body: TokenizeBody) -> answers.Tokenized:
    engine = service.engine
    if body.messages is None:
        text, special = body.prompt or "", body.add_special_tokens is not False
    else:
        text, special = rendered(service, body), bool(body.add_special_tokens)
    if engine.tokenizer is None:
        raise _no_tokenizer()
    tokens = text_ids(text, engine.tokenizer, engine.max_model_len, add_special_tokens=special)
    return {
        "count": len(tokens),
        "max_model_len": engine.max_model_len,
        "tokens": tokens,
        "token_strs": [service.token_text.name(token) for token in tokens] if body.return_token_strs else None,
    }


def _detokenized(service: GeneratingService, tokens: list[int]) -> answers.Detokenized:
    engine = service.engine
    if engine.tokenizer is None:
        raise _no_tokenizer()
    ids = prompt_ids(tokens, None, engine.model.vocab_size, len(tokens) + 1) if tokens else []
    return {"prompt": engine.tokenizer.decode(ids)}


def _no_tokenizer() -> RequestError:
    return RequestError("the model directory has no tokenizer, so texts have no token ids")
