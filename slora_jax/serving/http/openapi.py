"""The OpenAPI schema: what routes may answer, and an application that documents it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from slora_jax.serving.http.answers import Error

Responses = dict[int | str, dict[str, Any]]

_ERRORS = {
    400: "A field is wrong, or they contradict each other",
    401: "No valid API key",
    403: "The API key lacks the right, or the path leads out of the configured directories",
    404: "There is no such model or adapter",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "Too many of the client's sequences are unfinished",
    500: "The engine failed",
    503: "Not ready, stopping, or full",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds after which to try again", "schema": {"type": "integer"}}}

GENERATING = (400, 401, 403, 404, 408, 413, 429, 500, 503)
"""Errors of a request that generates."""
MANAGING = (400, 401, 403, 404, 408, 413, 500, 503)
"""Errors of a request that changes adapters."""


def answers_of(model: Any, *errors: int, stream: bool = False) -> Responses:
    """Builds a route's `responses=`.

    Args:
      model: the answer with status 200, one of `http.answers`.
      errors: statuses that the route may answer instead.
      stream: whether the answer may come as events too.
    """
    success: dict[str, Any] = {"model": model, "description": "Success"}
    return {200: success | ({"content": {"text/event-stream": {}}} if stream else {})} | errors_of(*errors)


def errors_of(*statuses: int) -> Responses:
    """Builds a route's `responses=` for errors alone."""
    return {
        status: {"model": Error, "description": _ERRORS[status]}
        | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})
        for status in statuses
    }


class DocumentedApp(FastAPI):
    """An application whose schema leaves out 422, which is never answered, and says where a key is needed."""

    needs_key = False

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = get_openapi(title=self.title, version=self.version, routes=self.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if self.needs_key and "401" in operation["responses"]:
                        operation["security"] = [{"key": []}]
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
            if self.needs_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            self.openapi_schema = schema
        return self.openapi_schema
