"""Metrics and state of a running service: Prometheus, the live page, adapters."""
