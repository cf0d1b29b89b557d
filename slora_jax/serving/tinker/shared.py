"""State shared by the routes: the open training, and the session that a request may use."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from slora_jax.serving.http.access import Client
from slora_jax.serving.service import service_of
from slora_jax.serving.tinker.training import Training


def _training(request: Request) -> Training:
    """Returns the service's training. Raises ApiError 503 while no request is accepted."""
    service = service_of(request)
    service.open_for(None)
    assert service.training is not None
    return service.training


HasTraining = Annotated[Training, Depends(_training)]


def owner_of(request: Request, client: Client) -> str:
    """Returns the owner of a client's sessions; without keys, all clients are one."""
    return client.name if service_of(request).settings.api_keys else ""
