"""The service as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from slora_jax.engine import Engine
from slora_jax.serving import adapter_endpoints, endpoints, errors, page_endpoints
from slora_jax.serving.access import Access
from slora_jax.serving.engine_loop import Health
from slora_jax.serving.errors import JsonResponse
from slora_jax.serving.limits import Gate
from slora_jax.serving.schemas import DocumentedApp, EngineHealth, Readiness, answers, errors_of
from slora_jax.serving.service import MayLook, Service, service_of
from slora_jax.serving.settings import ServerSettings

probes = APIRouter()


@probes.get("/health", responses=answers(EngineHealth) | {503: {"model": EngineHealth}})
async def health(request: Request) -> Response:
    """Returns whether the process is worth keeping: 503 if its engine is dead, or a call of it does not return."""
    loop = service_of(request).loop
    status = 503 if loop.health in (Health.DEAD, Health.STALLED) else 200
    return JsonResponse({"status": str(loop.health), "error": loop.error and repr(loop.error)}, status)


@probes.get("/metrics", response_class=Response, responses=errors_of(401) | {200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, client: MayLook) -> Response:
    """For Prometheus."""
    text, content_type = await asyncio.to_thread(service_of(request).metrics.render)
    return Response(text, media_type=content_type)


@probes.get("/ready", responses=answers(Readiness) | {503: {"model": Readiness}})
async def ready(request: Request) -> Response:
    """Returns whether requests are taken: everything is loaded, compiled and warm, no fault, not stopping."""
    service = service_of(request)
    status = "stopping" if service.is_draining else str(service.loop.health)
    return JsonResponse({"status": status}, 200 if service.is_ready else 503)


def create_app(settings: ServerSettings, build: Callable[[], Engine]) -> FastAPI:
    """The application; its lifespan is the engine's. build: makes the engine, on the engine's thread; meanwhile
    `/health` answers and everything else says 503."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(settings, build)
        app.state.service = service
        async with service.running():
            yield

    app = DocumentedApp(
        title="slora-jax", version=version("slora-jax"), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.needs_key = bool(settings.api_keys)
    errors.install(app)
    for router in (endpoints.router, adapter_endpoints.router, page_endpoints.router, probes):
        app.include_router(router)

    def done(route: str | None, method: str, status: int, seconds: float) -> None:
        app.state.service.metrics.http(route, method, status, seconds)

    app.add_middleware(Gate, limits=settings.limits, access=Access(settings.api_keys), on_request=done)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app
