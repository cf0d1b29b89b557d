"""The GPU benchmark: the sections of `pallas_kernels.bench`, and whole steps of the engine."""
