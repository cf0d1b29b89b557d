"""The ideal that adapter-aware routing is compared with, and how often the replicas are started."""

from contextlib import contextmanager

import pytest

from experiments import run as runner
from experiments.config import load_experiment
from experiments.results_file import ResultsFile
from experiments.rounds import Outcome
from experiments.serving import replicas
from experiments.serving.replicas import ReplicasRunner, ideal


@pytest.mark.parametrize(("capacity", "share"), [(2, 1.0), (1, 0.0)])
def test_an_ideal_split_gives_each_replica_half_of_the_adapters(capacity: int, share: float) -> None:
    assert ideal([0, 1, 2, 3] * 3, capacity, warm_up=4) == share


def test_the_most_popular_adapter_has_a_replica_of_its_own_before_the_others_share() -> None:
    assert ideal([0, 1, 0, 2, 0, 1, 0, 2], capacity=1, warm_up=0) == 3 / 8  # 1 and 2 evict each other


def test_runs_that_follow_each_other_share_their_replicas(tmp_path, monkeypatch) -> None:
    starts = []

    @contextmanager
    def run_replicas(server, **options):
        starts.append(bool(options))
        yield None

    def measure(self, run, round_number):
        self._replicas(run)
        return Outcome({"throughput": 1.0})

    monkeypatch.setattr(replicas, "_write_model", lambda run, directory: (None, 512))
    monkeypatch.setattr(replicas, "run_replicas", run_replicas)
    monkeypatch.setattr(ReplicasRunner, "measure", measure)
    experiment = load_experiment(runner.RESULTS.parents[1] / "configs" / "measured" / "replica_affinity.yaml")
    with ResultsFile(tmp_path / "x.jsonl") as results:
        runner.run_experiment(experiment, results, progress=False)
        assert len(results) == len(experiment.runs) == 9
    assert starts == [False, True, False, True]  # three panels: the second begins with the replicas of the first's last
