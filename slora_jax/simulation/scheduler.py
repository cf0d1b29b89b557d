"""The engine's scheduler with the modes of S-LoRA's code and support for fast forward."""

from __future__ import annotations

from collections.abc import Sequence

from slora_jax.errors import RequestError
from slora_jax.memory import AdapterResidency, PrefixCache
from slora_jax.scheduling import AdapterSource, Policy, Request, ScheduledSequence, Scheduler, StepPlan
from slora_jax.simulation.system import SystemConfig


class SimulatedScheduler(Scheduler):
    """The scheduler with two more settings of `SystemConfig`.

    admit_every: 1 tries to admit (and applies the policy's aborts) in every step. n > 1, as in the paper's code (10),
    decodes for n steps after an admission, then tries in every step until one admits; it also tries when nothing runs.

    mixed: True lets chunks of prompts share steps with decoding. False, as in the paper's code, prefills admitted
    requests whole in a separate step while the others pause; `max_num_batched_tokens` then bounds the prompts of one
    admission.
    """

    def __init__(
        self,
        residency: AdapterResidency,
        policy: Policy,
        system: SystemConfig,
        adapters: AdapterSource,
        prefixes: PrefixCache | None = None,
    ) -> None:
        super().__init__(residency, policy, system, adapters, prefixes)
        self._every, self._mixed = system.admit_every, system.mixed
        self._decoded = 0  # steps since the last admission

    @property
    def admission_due(self) -> bool:
        """Returns whether the next step tries to admit."""
        return self._every == 1 or self._decoded >= self._every or not self.running

    @property
    def may_change(self) -> bool:
        """Returns whether the next step may admit or prefetch. With an empty queue it cannot: no request waits for the
        uploads in flight, so their landing changes nothing."""
        return bool(self.waiting) and (self.admission_due or self.config.prefetch > 0)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
          RequestError: with `mixed=False`, prompt and output exceed a step, so the request could not be prefilled again
            after a preemption.
        """
        longest = len(request.prompt) + request.max_new - 1
        if not self._mixed and longest > self.config.max_num_batched_tokens:
            raise RequestError(
                f"request {request.id!r}: its {longest} tokens of prompt and output may have to be prefilled in one "
                f"step, which has at most max_num_batched_tokens={self.config.max_num_batched_tokens}; raise that, or "
                "set mixed=True"
            )
        super().add(request)

    def schedule(self, now: float) -> StepPlan:
        plan = StepPlan()
        due = self.admission_due
        if due:
            self._abort(plan, now)
        if self._mixed:
            self._extend_running(plan, now)
        admitted = due and not plan.preempted and self._admit(plan, now)
        if not self._mixed and not admitted:
            self._extend_running(plan, now)
        self._decoded = 0 if admitted else self._decoded + 1
        self._plan_uploads(plan, now)
        self.policy.stepped(plan.sequences)
        return plan

    def schedule_decode(self, sequences: Sequence[ScheduledSequence], now: float) -> None:
        """Like `schedule`, for a step that only decodes one token per running sequence: notifies the policy and counts
        the step. The caller updates the requests."""
        if self.admission_due:
            self._abort(StepPlan(), now)
        self._decoded += 1
        self.policy.stepped(sequences)

    def _fits_budget(self, request: Request, budget: int) -> bool:
        return self._mixed or request.num_tokens <= budget
