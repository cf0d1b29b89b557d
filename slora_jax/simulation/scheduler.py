"""The engine's scheduler with the modes of S-LoRA's code, and with steps that a simulation need not plan one by one."""

from __future__ import annotations

from collections.abc import Sequence

from slora_jax.errors import RequestError
from slora_jax.memory import AdapterResidency, PrefixCache
from slora_jax.scheduling import AdapterSource, Policy, Request, ScheduledSequence, Scheduler, StepPlan
from slora_jax.simulation.system import SystemConfig


class SimulatedScheduler(Scheduler):
    """The scheduler under two more settings of `SystemConfig`.

    admit_every: 1 tries to admit (and asks for the policy's aborts) in every step; n > 1 lets n steps decode after an
    admission, then tries in every step until one admits, and whenever nothing runs. The paper's code has 10.

    mixed: prefill and decode share steps, prompts in chunks. False, as in the paper's code: admitted requests prefill
    in a step of their own, whole, while the others pause; the rows of a step then bound the prompts of one admission.
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
        """Returns whether the next step may admit, or prefetch. With an empty queue, uploads in flight are of adapters
        that no request wants any more, and change nothing when they land."""
        return bool(self.waiting) and (self.admission_due or self.config.prefetch > 0)

    def add(self, request: Request) -> None:
        """Queues a request that fits into the pool alone.

        Raises:
          RequestError: prompts run whole (`mixed=False`), and with its output, as after a preemption, this one never
            would.
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
        """Like `schedule` for a step that admits nothing and gives each running sequence its next token: tells the
        policy and counts the step. The caller updates the requests."""
        if self.admission_due:
            self._abort(StepPlan(), now)
        self._decoded += 1
        self.policy.stepped(sequences)

    def _fits_budget(self, request: Request, budget: int) -> bool:
        return self._mixed or request.num_tokens <= budget
