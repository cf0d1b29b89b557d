"""POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter (vLLM's), GET /v1/adapters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from slora_jax.serving.observation import adapter_states
from slora_jax.serving.protocol import LoadBody, UnloadBody
from slora_jax.serving.service import MayLook, MayManage, service_of

router = APIRouter(prefix="/v1")


@router.post("/load_lora_adapter")
async def load_lora_adapter(request: Request, client: MayManage, body: LoadBody) -> dict[str, Any]:
    """Registers a PEFT directory inside the configured ones, now and at the next start."""
    service = service_of(request)
    info = await service.adapters.load(service.loop, body.lora_name, body.lora_path, body.load_inplace)
    return {
        "message": f"Success: LoRA adapter '{info.name}' added successfully.",
        "name": info.name,
        "digest": info.digest,
        "rank": info.rank,
        "pages": info.num_pages,
        "bytes": info.nbytes,
    }


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(request: Request, client: MayManage, body: UnloadBody) -> dict[str, Any]:
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
    return {
        "message": f"Success: LoRA adapter '{body.lora_name}' removed successfully. {what}",
        "name": body.lora_name,
        "freed": done.is_gone,
        "freed_pages": done.pages,
        "freed_bytes": done.nbytes,
        "drain_seconds": round(done.seconds, 3),
    }


@router.get("/adapters")
async def adapters(request: Request, client: MayLook, limit: int | None = None, search: str = "") -> dict[str, Any]:
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
    shown = states if limit is None else states[: max(0, limit)]
    return {
        "object": "list",
        "total": len(states),
        "data": [state.to_json() for state in shown],
        "refused": service.adapters.refused,
    }
