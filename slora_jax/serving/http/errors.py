"""Errors in OpenAI's form: a status, and a body with a message, its kind, a code, and the field at fault."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from slora_jax.errors import AdapterError, ConfigError, RequestError, SloraError, UnknownAdapterError
from slora_jax.serving.http.answers import Error
from slora_jax.serving.http.body import NOT_SUPPORTED

logger = logging.getLogger("slora_jax.serving")

MAX_MESSAGE = 2000
"""Characters of an error's message; the input that it quotes may be long."""
MAX_PARAM = 200
"""Characters of the field's name in an error; clients may invent names."""

_found = reprlib.Repr(maxlevel=3, maxstring=80, maxlong=80, maxother=80)

to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""Encodes an answer in ASCII, so that anything a client sent can be quoted, half of a surrogate pair too. NaN and
infinity, which JSON lacks, raise ValueError."""

quoted = json.encoder.encode_basestring_ascii
"""Encodes a string as `to_json` does, sooner."""


class ApiError(HTTPException):
    """An error for a client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Creates an error.

        Args:
          param: the field at fault.
          retry_after: seconds after which to try again.
        """
        after = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        super().__init__(status, message, {**(headers or {}), **after})
        self.kind, self.code, self.param = kind, code, param

    def body(self) -> Error:
        """Returns OpenAI's error object."""
        message = str(self.detail)
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
        param = self.param and self.param[:MAX_PARAM]
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}

    def response(self) -> Response:
        """Returns the HTTP response."""
        return JsonResponse(self.body(), self.status_code, self.headers)


class JsonResponse(Response):
    """A response in JSON (`to_json`)."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def unavailable(message: str, *, code: str, retry_after: float | None = None) -> ApiError:
    """The service cannot take the request now."""
    return ApiError(503, message, kind="service_unavailable", code=code, retry_after=retry_after)


def stopping() -> ApiError:
    """The service accepts no more requests."""
    return unavailable("the service is stopping", code="stopping", retry_after=10)


def incomplete() -> ApiError:
    """The deadline of a drain has passed."""
    return unavailable("the service was stopped before the answer was complete", code="stopping")


def engine_failed(message: str) -> ApiError:
    """The engine failed a request that it had accepted."""
    return ApiError(500, message, kind="server_error", code="engine_error")


def too_large_head() -> ApiError:
    """The request line and header fields exceed their limit."""
    return ApiError(431, "the request's head is too large (limits.header_bytes)", code="large_head")


def as_api_error(error: Exception) -> ApiError:
    """Converts an exception. The client sees this project's messages; any other exception is logged and hidden."""
    match error:
        case ApiError():
            return error
        case RequestError():
            code = "context_length_exceeded" if "max_model_len" in str(error) else "invalid_request"
            return ApiError(400, str(error), code=code, param="prompt")
        case ConfigError():
            field = str(error).partition("=")[0].removeprefix("SamplingParams.")
            return ApiError(400, str(error).removeprefix("SamplingParams."), code="invalid_value", param=field)
        case UnknownAdapterError():
            return ApiError(404, str(error).replace("adapter", "model", 1), code="model_not_found", param="model")
        case AdapterError():
            return ApiError(400, str(error), code="invalid_adapter")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log says more", kind="server_error", code="internal_error")


def install(app: FastAPI) -> None:
    """Makes `app` answer every error in this form."""

    def answer(request: Request, error: ApiError) -> Response:
        request.app.state.service.http_metrics.refused(error.code or str(error.status_code))
        return error.response()

    async def known(request: Request, error: Exception) -> Response:
        return answer(request, as_api_error(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(request, _invalid(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"]
        code, message = {
            400: ("bad_json", "the body cannot be read: nested too deep, a number too long, or no UTF-8"),
            404: ("no_such_path", f"no such path: {path[:MAX_PARAM]}"),
            405: ("wrong_method", f"{path[:MAX_PARAM]} does not take {request.method}{_cors(request)}"),
        }.get(error.status_code, (None, str(error.detail)))
        return answer(request, ApiError(error.status_code, message, code=code, headers=error.headers))

    for kind in (ApiError, SloraError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _cors(request: Request) -> str:
    """Returns the remedy for a browser's preflight request."""
    asks = request.method == "OPTIONS" and "origin" in request.headers
    return "; slora serve --cors-origin lets pages of other origins call" if asks else ""


def _invalid(error: RequestValidationError) -> ApiError:
    """Names one wrong field, the value found, and the values allowed."""
    problem = max(error.errors(), key=_relevance)
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem.get('ctx', {}).get('error', '')}", code="bad_json")
    _, *names = map(str, problem["loc"])  # after "body" or "query"
    field = ".".join(name for i, name in enumerate(names) if not (i and _is_type(name)))
    if problem["type"] == "not_supported" or (problem["type"] == "extra_forbidden" and names[-1] in NOT_SUPPORTED):
        found = _found.repr(problem.get("input"))[:80]
        message = f"{field}: slora-jax does not support this; leave the field out (found {found})"
        return ApiError(400, message, code="not_supported", param=field)
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {field!r}", code="unknown_field", param=field)
    if problem["type"] == "missing":
        return ApiError(400, f"{field or 'the body'} is missing", code="missing_field", param=field or None)
    what = problem["msg"].removeprefix("Value error, ")
    if not field:  # fields that contradict each other, or the body is not an object
        if isinstance(problem.get("input"), bytes):
            return ApiError(400, "the body is not JSON: send Content-Type: application/json", code="not_json")
        return ApiError(400, what.replace("Input", "the body"), code="invalid_value")
    found = _found.repr(problem.get("input"))
    found = found if len(found) <= 80 else f"{found[:80]}..."
    return ApiError(400, f"{field}={found}: {what}", code="invalid_value", param=field)


def _relevance(problem: dict[str, Any]) -> tuple[bool, int, int]:
    """Ranks the complaints about a field that takes several types, one for each type. An error that is not a type
    error, or is nested deepest, belongs to the type that the client intended."""
    at = [part for part in problem["loc"] if isinstance(part, int)]
    return not problem["type"].endswith("_type"), len(problem["loc"]), at[-1] if at else -1


def _is_type(name: str) -> bool:
    return "[" in name or name in ("str", "int", "constrained-str", "constrained-int")
