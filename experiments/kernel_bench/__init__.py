"""The GPU benchmark: the sections of `pallas_kernels.bench`, and whole decode steps of the engine."""
