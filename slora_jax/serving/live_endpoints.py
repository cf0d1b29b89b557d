"""GET / and its files: the live page; GET /state and /state/pages, which it asks."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax.serving.engine_loop import Health
from slora_jax.serving.service import MayLook, service_of
from slora_jax.serving.state import live_page_files

router = APIRouter()

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
FILES = live_page_files()


def _file(name: str) -> Response:
    content, content_type = FILES[name]
    return Response(content, media_type=content_type, headers=HEADERS)


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The live page. Anybody may have it: it shows nothing until `/state` answers."""
    return _file("index.html")


for _name in FILES.keys() - {"index.html"}:
    router.add_api_route(f"/{_name}", lambda name=_name: _file(name), include_in_schema=False)


@router.get("/state")
async def state(request: Request, client: MayLook) -> dict[str, Any]:
    """What the live page shows: see `LiveState.to_json`."""
    service = service_of(request)
    health, error = service.loop.health, service.loop.error
    if health in (Health.STARTING, Health.READY):
        return service.live.to_json("draining" if service.is_draining else health)
    return service.live.to_json(health, None if error is None else repr(error))


@router.get("/state/pages")
async def pages(request: Request, client: MayLook) -> Response:
    """What each page of the pool holds, one byte a page: an index into `observation.PAGE_KINDS`."""
    return Response(await service_of(request).pages.kinds(), media_type="application/octet-stream")
