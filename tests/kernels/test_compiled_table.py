"""The table of compiled kernels, and the results file behind it."""

import json

from experiments.kernel_bench import compiled
from pallas_kernels.devices import DEVICES


def row(version, registers, case="decode", device="h200"):
    numbers = {"registers": registers, "instructions_per_kb": 27.5, "launches": 1, "blocks": 528, "dead_blocks": None}
    return {"kernel": "lora_shrink", "case": case, "device": device, "version": version, **numbers}


def test_new_rows_replace_only_new_rows_of_the_same_case(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    kept = [row("old", 112), row("predicted", 64), row("new", 90, case="prefill"), row("new", 91, device="l4")]
    path.write_text(json.dumps([*kept, row("new", 99)]))
    monkeypatch.setattr(compiled, "COLLECT", (lambda device: [row("new", 80, device=device.name)],))
    rows = compiled.update(DEVICES["h200"], path)
    written = json.loads(path.read_text())
    assert [one for one in written if one["device"] == "h200"] == rows
    assert all(one in written for one in [*kept, row("new", 80)]) and len(written) == 5


def test_the_table_shows_old_new_and_predicted():
    text = compiled.table([row("old", 112), row("new", 80), row("predicted", None)])
    head, line = text.splitlines()[2:]
    assert head.split() == ["lora_shrink", "registers", "instructions_per_kb", "launches", "blocks"]
    assert line.split()[:6] == ["decode", "112", "/", "80", "/", "-"]


def test_every_committed_case_has_old_and_new_numbers():
    rows = json.loads(compiled.RESULTS.read_text())
    old, new = ({compiled._key(one) for one in rows if one["version"] == version} for version in ("old", "new"))
    assert old and old == new
    assert all(set(one) & set(compiled.NUMBERS) for one in rows)
