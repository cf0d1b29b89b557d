"""Requests, sampling parameters, policies and the continuous-batching scheduler."""

from slora_jax.scheduling.policy import Fcfs, Policy
from slora_jax.scheduling.request import AdapterUse, FinishReason, Request, RequestMetrics, Status
from slora_jax.scheduling.sampling_params import MAX_LOGPROBS, SamplingParams
from slora_jax.scheduling.scheduler import AdapterState, ScheduledSequence, Scheduler, SchedulerLimits, StepPlan

__all__ = [
    "MAX_LOGPROBS",
    "AdapterState",
    "AdapterUse",
    "Fcfs",
    "FinishReason",
    "Policy",
    "Request",
    "RequestMetrics",
    "SamplingParams",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerLimits",
    "Status",
    "StepPlan",
]
