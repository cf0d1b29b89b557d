"""GPU kernels of slora-jax and their XLA references: one folder per op."""
