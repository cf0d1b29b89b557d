"""One answer of what every replica says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from slora_jax.serving.replica import Answer, HttpRequest


def choose(request: HttpRequest, answers: Sequence[Answer]) -> Answer:
    """The one that speaks for all replicas. Of metrics, all of them, each with the replica's rank; of a change, the
    worst failure, else a success (a replica that had followed another's change already refuses its own); of /ready, any
    that is; otherwise the first replica's."""
    path, method = request.scope["path"], request.scope["method"]
    if path == "/metrics" and all(answer.status == 200 for answer in answers):
        first = answers[0]
        body = join_metrics([(answer.rank, answer.body.decode()) for answer in answers])
        headers = [(name, value) for name, value in first.headers if name != b"content-length"]
        return Answer(first.rank, 200, [*headers, (b"content-length", str(len(body)).encode())], body)
    if path == "/ready":
        return min(answers, key=lambda answer: answer.status)
    if method in ("GET", "HEAD", "OPTIONS"):
        return answers[0]
    return min(answers, key=lambda answer: (answer.status < 500, answer.status))


def join_metrics(texts: Sequence[tuple[int, str]]) -> bytes:
    """One exposition of several replicas', whose samples are told apart by a label `replica`."""

    class Joined(Collector):
        def collect(self) -> Iterator[Metric]:
            families: dict[str, Metric] = {}
            for rank, text in texts:
                for family in text_string_to_metric_families(text):
                    joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    labels = {"replica": str(rank)}
                    joined.samples += [one._replace(labels={**one.labels, **labels}) for one in family.samples]
            yield from families.values()

    registry = CollectorRegistry()
    registry.register(Joined())
    return generate_latest(registry)
