"""Steps an engine until all requests have ended."""

from slora_jax import Engine, RequestOutput


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Returns request id -> output of the requests that ended."""
    outputs = {}
    while engine.has_work():
        outputs |= {delta.request_id: delta.output for delta in engine.step() if delta.output is not None}
    engine.check()
    return outputs
