"""Published rows that are compared with no result of ours, and the reasons."""

from __future__ import annotations

from experiments.paper.results import PaperRow

BY_HAND = "synthetic/bmm/synthetic_req_rate_a100-80_S4_bmm.jsonl"


def exclusion(row: PaperRow) -> str | None:
    """Returns the reason why the row is left out; None if it is used."""
    if row.system == "pets":
        return "another scheduler (PetS), in none of the paper's figures and not part of this project"
    if "/backup/" in row.file:
        return "superseded: an earlier run of an experiment that was repeated with a later version of the code"
    if row.file.endswith("_unused.jsonl"):
        return "marked unused by the authors: an earlier version of the code, up to 25% slower than the published run"
    if row.file == BY_HAND:
        return "its first-token latency and attainment were put in by hand; the measured values are in *_bmm_30"
    return None
