"""POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter (vLLM's), GET /v1/adapters."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from slora_jax.serving.errors import JsonResponse
from slora_jax.serving.observation import adapter_states
from slora_jax.serving.protocol import LoadBody, UnloadBody
from slora_jax.serving.schemas import MANAGING, AdapterList, Loaded, Unloaded, answers
from slora_jax.serving.service import MayLook, MayManage, service_of

router = APIRouter(prefix="/v1")


@router.post("/load_lora_adapter", responses=answers(Loaded, *MANAGING))
async def load_lora_adapter(request: Request, client: MayManage, body: LoadBody) -> Response:
    """Registers a PEFT directory inside the configured ones, now and at the next start."""
    service = service_of(request)
    info = await service.adapters.load(service.loop, body.lora_name, body.lora_path, body.load_inplace)
    return JsonResponse(
        {
            "message": f"Success: LoRA adapter '{info.name}' added successfully.",
            "name": info.name,
            "digest": info.digest,
            "rank": info.rank,
            "pages": info.num_pages,
            "bytes": info.nbytes,
        }
    )


@router.post("/unload_lora_adapter", responses=answers(Unloaded, *MANAGING))
async def unload_lora_adapter(request: Request, client: MayManage, body: UnloadBody) -> Response:
    """Takes no more requests for the adapter, waits until those under way have ended, and says what became free."""
    service = service_of(request)
    seconds = service.settings.drain_seconds if body.drain_seconds is None else body.drain_seconds
    done = await service.adapters.unload(service.loop, body.lora_name, seconds)
    if done.shared:
        what = "Its content stays: another name has the same."
    elif not done.is_gone:
        what = "Requests under way still use it; its memory is free when they have ended."
    else:
        what = "Its memory is free."
    return JsonResponse(
        {
            "message": f"Success: LoRA adapter '{body.lora_name}' removed successfully. {what}",
            "name": body.lora_name,
            "freed": done.is_gone,
            "freed_pages": done.pages,
            "freed_bytes": done.nbytes,
            "drain_seconds": round(done.seconds, 3),
        }
    )


@router.get("/adapters", responses=answers(AdapterList, 400, 401, 503))
async def adapters(
    request: Request, client: MayLook, limit: Annotated[int | None, Query(ge=0)] = None, search: str = ""
) -> Response:
    """Every registered adapter, the one used last first: where it is, how large, how long its requests waited. `limit`:
    so many of them at most; `search`: only those with this in their name or digest. `refused`: those of the watched
    directory that cannot be used, and why."""
    service = service_of(request)
    snapshot = service.loop.snapshot
    device = {} if snapshot is None else snapshot.device
    states = adapter_states(service.loop.engine.store, device, service.usage)
    if search:
        wanted = search.lower()
        states = [state for state in states if wanted in state.name.lower() or wanted in state.digest]
    return JsonResponse(
        {
            "object": "list",
            "total": len(states),
            "data": [state.to_json() for state in states[:limit]],
            "refused": service.adapters.refused,
        }
    )
