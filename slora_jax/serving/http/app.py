"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from slora_jax.engine import Engine
from slora_jax.serving.http import embeddings, endpoints, errors, page, tokenization
from slora_jax.serving.http.access import Access
from slora_jax.serving.http.limits import Gate, OnRequest
from slora_jax.serving.http.openapi import DocumentedApp
from slora_jax.serving.service import Service
from slora_jax.serving.settings import ServerSettings


def create_app(settings: ServerSettings, build: Callable[[], Engine]) -> FastAPI:
    """Creates the application; its lifespan is the engine's.

    Args:
      build: creates the engine, on the engine's thread. Until it returns, `/health` answers and all else gets a 503.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = Service(settings, build)
        async with app.state.service.running():
            yield

    def done(route: str | None, method: str, status: int, seconds: float) -> None:
        app.state.service.metrics.http(route, method, status, seconds)

    app = app_with_text(settings, lifespan, done)
    app.include_router(endpoints.router)
    app.include_router(page.router)
    if settings.train is not None:
        from slora_jax.serving.tinker import model_routes, routes

        app.include_router(routes.router)
        app.include_router(model_routes.router)

    return app


def app_with_text(
    settings: ServerSettings, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]], on_request: OnRequest
) -> DocumentedApp:
    """Creates an application with the endpoints that read and generate text, the limits and the errors. `lifespan` sets
    its `state.service` to a `GeneratingService`."""
    app = DocumentedApp(
        title="slora-jax", version=version("slora-jax"), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.needs_key = bool(settings.api_keys)
    app.state.access = Access(settings.api_keys)
    errors.install(app)
    for router in (endpoints.generating, embeddings.router, tokenization.router):
        app.include_router(router)
    app.add_middleware(Gate, limits=settings.limits, access=app.state.access, on_request=on_request)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app
