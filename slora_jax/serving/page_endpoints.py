"""GET / and its files, GET /state, GET /state/pages: the live page and what it shows."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax import phases
from slora_jax.serving.engine_loop import Health
from slora_jax.serving.errors import ApiError
from slora_jax.serving.observation import page_kinds
from slora_jax.serving.service import MayLook, Service, service_of
from slora_jax.serving.state import Status, live_page_files

POLICY = "default-src 'self'; frame-ancestors 'none'"

router = APIRouter(include_in_schema=False)
files = cache(live_page_files)


@router.get("/")
async def index() -> Response:
    """The live page."""
    return _file("index.html")


@router.get("/page.css")
@router.get("/page.js")
@router.get("/icon.svg")
async def file(request: Request) -> Response:
    """What it is made of."""
    return _file(request.url.path.removeprefix("/"))


@router.get("/state")
async def state(request: Request, client: MayLook) -> dict[str, Any]:
    """The engine now and in the last two minutes (`LiveState.to_json`)."""
    service = service_of(request)
    return service.live.to_json(*_status(service))


@router.get("/state/pages")
async def pages(request: Request, client: MayLook) -> Response:
    """What each page of the pool holds, a byte each: an index into `PAGE_KINDS`."""
    loop = service_of(request).loop
    if loop.snapshot is None:
        raise ApiError(503, "the engine is starting", code="starting", retry_after=5)
    kinds = await loop.call(page_kinds)
    return Response(kinds.tobytes(), media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


def _file(name: str) -> Response:
    content, kind = files()[name]
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(content, media_type=kind, headers=headers)


def _phase() -> str:
    """Returns the phase of the start, in words."""
    name, parts = phases.now()
    match name, parts:
        case "programs", (done, total):
            return f"Program {min(done + 1, total)} of {total}."
        case ((None | "programs"), _):
            return "Preparing."
    return f"Loading: {name}" + (f", {parts[0]} of {parts[1]}." if parts else ".")


def _status(service: Service) -> tuple[Status, str | None]:
    loop = service.loop
    if service.is_draining:
        return "draining", f"{loop.num_unfinished} requests have yet to end"
    match loop.health:
        case Health.READY:
            return "ready", None
        case Health.STARTING:
            return "starting", _phase()
    return "failed", f"{loop.health}: {loop.error!r}"
