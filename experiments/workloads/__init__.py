"""Request lists: the paper's synthetic generator, a stand-in for its real trace, and traces from files."""

from experiments.workloads.arena import arena_like
from experiments.workloads.azure import azure
from experiments.workloads.synthetic import synthetic
from experiments.workloads.workload import BASE, Workload

__all__ = ["BASE", "Workload", "arena_like", "azure", "synthetic"]
