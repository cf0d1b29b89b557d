"""Requests, sampling parameters, policies and the continuous-batching scheduler."""

from slora_jax.scheduling.ageing import Ageing
from slora_jax.scheduling.clustering import Clustering
from slora_jax.scheduling.early_abort import EarlyAbort
from slora_jax.scheduling.merge import OneAdapter
from slora_jax.scheduling.plan import ScheduledSequence, StepPlan
from slora_jax.scheduling.policy import Batch, Fcfs, Lcfs, Policy
from slora_jax.scheduling.prefetch import AdapterState
from slora_jax.scheduling.queue import RequestQueue
from slora_jax.scheduling.registry import POLICIES, make_policy
from slora_jax.scheduling.request import AdapterUse, FinishReason, Request, RequestMetrics, Status
from slora_jax.scheduling.sampling_params import MAX_LOGPROBS, SamplingParams
from slora_jax.scheduling.scheduler import ADMISSIONS, Scheduler, SchedulerLimits
from slora_jax.scheduling.vtc import Vtc

__all__ = [
    "ADMISSIONS",
    "MAX_LOGPROBS",
    "POLICIES",
    "AdapterState",
    "AdapterUse",
    "Ageing",
    "Batch",
    "Clustering",
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
    "SchedulerLimits",
    "Status",
    "StepPlan",
    "Vtc",
    "make_policy",
]
