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
    from slora_jax.scheduling.priority import Priority
    from slora_jax.scheduling.queue import RequestQueue
    from slora_jax.scheduling.registry import POLICIES, make_policy
    from slora_jax.scheduling.request import AdapterUse, FinishReason, Request, RequestMetrics, Status
    from slora_jax.scheduling.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
    from slora_jax.scheduling.scheduler import Scheduler
    from slora_jax.scheduling.structured import StructuredOutputs, TokenGrammar
    from slora_jax.scheduling.vtc import Vtc
else:
    __getattr__, __dir__, __all__ = exported(
        __name__,
        config="ADMISSIONS CoreConfig",
        ageing="Ageing",
        clustering="Clustering",
        early_abort="EarlyAbort",
        merge="OneAdapter",
        plan="ScheduledSequence StepPlan",
        policy="Batch Fcfs Lcfs Policy",
        prefetch="AdapterSource AdapterState",
        priority="Priority",
        queue="RequestQueue",
        registry="POLICIES make_policy",
        request="AdapterUse FinishReason Request RequestMetrics Status",
        sampling_params="MAX_LOGIT_BIAS MAX_LOGPROBS SamplingParams",
        scheduler="Scheduler",
        structured="StructuredOutputs TokenGrammar",
        vtc="Vtc",
    )
