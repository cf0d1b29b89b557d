"""The GPU benchmark of `pallas_kernels.bench` with one more section: whole decode steps of the engine."""
