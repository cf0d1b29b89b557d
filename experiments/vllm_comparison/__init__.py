"""Throughput beside vLLM's CPU build: `python -m experiments.vllm_comparison`.

This package itself imports nothing, because vLLM's Python, which lacks slora-jax, runs `vllm_worker` from it.
"""
