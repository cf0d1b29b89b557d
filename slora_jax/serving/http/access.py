"""API keys and their rights, checked for every request."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

from fastapi import Depends, Request

from slora_jax.serving.http.errors import ApiError
from slora_jax.serving.settings import ApiKey, Right


@dataclass(frozen=True)
class Client:
    """The sender of a request: the name of an API key or, without keys, an address."""

    name: str


class Access:
    """Identifies clients by their API keys."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self._keys = keys

    def check(self, request: Request, right: Right | None) -> Client:
        """Returns the client of a request.

        Args:
          right: the right that its key must have; None: any key will do.

        Raises:
          ApiError: 401 without a valid key, 403 for a key without the right.
        """
        if not self._keys:
            return Client(request.client.host if request.client else "local")
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if "x-api-key" in request.headers:  # Tinker's client
            kind, key = "bearer", request.headers["x-api-key"]
        if kind.lower() != "bearer" or not key:
            raise _unauthorized("no API key: send it as 'Authorization: Bearer KEY'")
        given = sha256(key.strip().encode()).digest()
        known = [one for one in self._keys if hmac.compare_digest(one.digest, given)]  # compares all, in constant time
        if not known:
            raise _unauthorized("the API key is not known")
        if right is not None and right not in known[0].rights:
            message = f"the API key {known[0].name!r} has no right to {right}"
            raise ApiError(403, message, kind="permission_error", code="forbidden")
        return Client(known[0].name)


def _unauthorized(message: str) -> ApiError:
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)


def _may(right: Right | None) -> Callable[[Request], Awaitable[Client]]:
    async def check(request: Request) -> Client:  # FastAPI would call a plain function in a thread
        access: Access = request.app.state.access
        return access.check(request, right)

    return check


MayServe = Annotated[Client, Depends(_may("serve"))]
"""A client that may generate."""
MayTrain = Annotated[Client, Depends(_may("train"))]
"""A client that may train adapters."""
MayManage = Annotated[Client, Depends(_may("manage"))]
"""A client that may load and unload adapters."""
MayLook = Annotated[Client, Depends(_may(None))]
"""A client with any right."""
