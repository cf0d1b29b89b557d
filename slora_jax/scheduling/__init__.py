"""Requests, sampling parameters, policies and the continuous-batching scheduler."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.scheduling.ageing import Ageing
    from slora_jax.scheduling.clustering import Clustering
    from slora_jax.scheduling.config import ADMISSIONS, CoreConfig
    from slora_jax.scheduling.early_abort import EarlyAbort
    from slora_jax.scheduling.merge import OneAdapter
    from slora_jax.scheduling.plan import ScheduledSequence, StepPlan
    from slora_jax.scheduling.policy import Batch, Fcfs, Lcfs, Policy
    from slora_jax.scheduling.prefetch import AdapterSource, AdapterState
    from slora_jax.scheduling.queue import RequestQueue
    from slora_jax.scheduling.registry import POLICIES, make_policy
    from slora_jax.scheduling.request import AdapterUse, FinishReason, Request, RequestMetrics, Status
    from slora_jax.scheduling.sampling_params import MAX_LOGPROBS, SamplingParams
    from slora_jax.scheduling.scheduler import Scheduler
    from slora_jax.scheduling.vtc import Vtc
else:
    __getattr__, __dir__ = exported(
        __name__,
        {
            "slora_jax.scheduling.config": ("ADMISSIONS", "CoreConfig"),
            "slora_jax.scheduling.ageing": ("Ageing",),
            "slora_jax.scheduling.clustering": ("Clustering",),
            "slora_jax.scheduling.early_abort": ("EarlyAbort",),
            "slora_jax.scheduling.merge": ("OneAdapter",),
            "slora_jax.scheduling.plan": ("ScheduledSequence", "StepPlan"),
            "slora_jax.scheduling.policy": ("Batch", "Fcfs", "Lcfs", "Policy"),
            "slora_jax.scheduling.prefetch": ("AdapterSource", "AdapterState"),
            "slora_jax.scheduling.queue": ("RequestQueue",),
            "slora_jax.scheduling.registry": ("POLICIES", "make_policy"),
            "slora_jax.scheduling.request": ("AdapterUse", "FinishReason", "Request", "RequestMetrics", "Status"),
            "slora_jax.scheduling.sampling_params": ("MAX_LOGPROBS", "SamplingParams"),
            "slora_jax.scheduling.scheduler": ("Scheduler",),
            "slora_jax.scheduling.vtc": ("Vtc",),
        },
    )

__all__ = [
    "ADMISSIONS",
    "MAX_LOGPROBS",
    "POLICIES",
    "AdapterSource",
    "AdapterState",
    "AdapterUse",
    "Ageing",
    "Batch",
    "Clustering",
    "CoreConfig",
    "EarlyAbort",
    "Fcfs",
    "FinishReason",
    "Lcfs",
    "OneAdapter",
    "Policy",
    "Request",
    "RequestMetrics",
    "RequestQueue",
    "SamplingParams",
    "ScheduledSequence",
    "Scheduler",
    "Status",
    "StepPlan",
    "Vtc",
    "make_policy",
]
