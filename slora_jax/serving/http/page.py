"""The live page: GET / and its files, GET /state, GET /state/pages."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from slora_jax import phases
from slora_jax.serving.health import Health
from slora_jax.serving.http.access import MayLook
from slora_jax.serving.http.errors import unavailable
from slora_jax.serving.observability.live_state import Status
from slora_jax.serving.observability.snapshot import page_kinds
from slora_jax.serving.service import Service, service_of

POLICY = "default-src 'self'; frame-ancestors 'none'"
CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

router = APIRouter(include_in_schema=False)


@cache
def page_files() -> dict[str, tuple[bytes, str]]:
    """Returns the page's files by name, with their content types. `index.html` names the others relative to itself."""
    files = resources.files("slora_jax.serving.http").joinpath("live_page").iterdir()
    return {f.name: (f.read_bytes(), CONTENT_TYPES[f.name.rsplit(".", 1)[-1]]) for f in files if f.is_file()}


@router.get("/")
@router.get("/page.css")
@router.get("/page.js")
@router.get("/icon.svg")
async def file(request: Request) -> Response:
    """Returns a file of the page."""
    content, kind = page_files()[request.url.path.removeprefix("/") or "index.html"]
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(content, media_type=kind, headers=headers)


@router.get("/state")
async def state(request: Request, client: MayLook) -> dict[str, Any]:
    """Returns the engine's state now and in the last two minutes (`LiveState.to_json`)."""
    service = service_of(request)
    return service.live.to_json(*_status(service))


@router.get("/state/pages")
async def pages(request: Request, client: MayLook) -> Response:
    """Returns the content of each page of the pool, one byte each: an index into `PAGE_KINDS`."""
    loop = service_of(request).loop
    if loop.snapshot is None:
        raise unavailable("the engine is starting", code="starting", retry_after=5)
    kinds = await loop.call(page_kinds)
    return Response(kinds.tobytes(), media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


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


def _phase() -> str:
    """Returns the phase of the start, in words."""
    name, parts = phases.now()
    match name, parts:
        case "programs", (done, total):
            return f"Program {min(done + 1, total)} of {total}."
        case ((None | "programs"), _):
            return "Preparing."
    return f"Loading: {name}" + (f", {parts[0]} of {parts[1]}." if parts else ".")
