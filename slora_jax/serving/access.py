"""Who may use the service: API keys with rights, compared in constant time."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from fastapi import Request

from slora_jax.errors import ConfigError
from slora_jax.serving.errors import ApiError
from slora_jax.typed import refuse_unknown, typed

Right = Literal["serve", "manage"]
"""To generate, and to load and unload adapters."""

_FIELDS = ("name", "key", "key_env", "key_sha256", "rights")


@dataclass(frozen=True)
class ApiKey:
    """A client's key, of which only the SHA-256 is kept."""

    name: str
    digest: bytes = field(repr=False)
    rights: frozenset[str]

    @classmethod
    def from_mapping(cls, data: Any, where: str) -> ApiKey:
        """Of a config file: `name`, `rights` ("serve" alone if there are none) and one of `key`, `key_env` (a variable
        of the environment), `key_sha256` (hexadecimal).

        Raises:
          ConfigError: naming the field, but never the key.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: must be a mapping")
        refuse_unknown(data, _FIELDS, f"{where}.")
        name = typed(data.get("name") or None, str, f"{where}.name")
        given = [one for one in ("key", "key_env", "key_sha256") if one in data]
        if len(given) != 1:
            raise ConfigError(f"{where}: give one of key, key_env and key_sha256, found {', '.join(given) or 'none'}")
        rights = typed(data.get("rights", ["serve"]), tuple[Right, ...], f"{where}.rights")
        return cls(name, _digest(data, given[0], f"{where}.{given[0]}"), frozenset(rights))


@dataclass(frozen=True)
class Client:
    """Who sent a request: the name of an API key or, where there are no keys, an address."""

    name: str
    has_key: bool


class Access:
    """Tells who sent a request, and whether it may."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self._keys = keys

    def check(self, request: Request, right: Right | None) -> Client:
        """The client of a request; `right` None: any key will do.

        Raises:
          ApiError: 401 without a valid key, 403 for a key without the right.
        """
        if not self._keys:
            return Client(request.client.host if request.client else "local", has_key=False)
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise _unauthorized("no API key: send it as 'Authorization: Bearer KEY'")
        given = sha256(key.strip().encode()).digest()
        known = [one for one in self._keys if hmac.compare_digest(one.digest, given)]  # all are compared, every time
        if not known:
            raise _unauthorized("the API key is not known")
        if right is not None and right not in known[0].rights:
            raise ApiError(
                403, f"the API key {known[0].name!r} has no right to {right}", kind="permission_error", code="forbidden"
            )
        return Client(known[0].name, has_key=True)


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401,
        message,
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _digest(data: Mapping[str, Any], source: str, where: str) -> bytes:
    value = data[source]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: must be text")
    if source == "key_sha256":
        if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise ConfigError(f"{where}: must be 64 hexadecimal digits, as `sha256sum` prints")
        return bytes.fromhex(value)
    if source == "key_env":
        if not os.environ.get(value):
            raise ConfigError(f"{where}={value!r}: this variable of the environment is not set")
        value = os.environ[value]
    return sha256(value.encode()).digest()
