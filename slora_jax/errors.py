"""Errors that slora-jax raises on purpose. Each message names the field or file, the value found, and the remedy."""


class SloraError(Exception):
    """Base class of every error that slora-jax raises on purpose."""


class ConfigError(SloraError, ValueError):
    """A setting is unknown or out of range, or settings contradict each other."""


class UnsupportedModelError(SloraError, ValueError):
    """A checkpoint's architecture or config field is not supported; the message names it."""


class CheckpointError(SloraError, ValueError):
    """A checkpoint's files are missing, damaged, or disagree with its config."""


class AdapterError(SloraError, ValueError):
    """An adapter cannot be used (unsupported field, wrong shape, missing tensor, unknown name). Nothing has changed."""


class UnknownAdapterError(AdapterError):
    """No adapter has this name."""


class RequestError(SloraError, ValueError):
    """A request was rejected on arrival; other requests are not affected."""


class PoolError(SloraError, RuntimeError):
    """The pool's bookkeeping was violated (double free, leak, use after free): always a bug in the caller."""


class ProcessLostError(SloraError, RuntimeError):
    """One of the processes that serve a model together failed or exited; the others cannot continue without it."""


class MetricsError(SloraError, ValueError):
    """A metric is undefined for the recorded data: no requests, or too short a window."""
