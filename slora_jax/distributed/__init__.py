"""Serving one model with several processes: process 0 leads, the followers repeat its calls on their own devices."""

from typing import TYPE_CHECKING

from pallas_kernels.exports import exported

if TYPE_CHECKING:
    from slora_jax.distributed.follower import Follower
    from slora_jax.distributed.group import ProcessGroup
    from slora_jax.distributed.join import join_processes
else:
    __getattr__, __dir__, __all__ = exported(__name__, follower="Follower", group="ProcessGroup", join="join_processes")
