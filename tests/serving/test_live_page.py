"""The live page in a browser: numbers, colours, hostile names, phones, dark mode, keys, and a lost server."""

import re
import time

import numpy as np
import pytest
from observed_engine import recording
from page_server import CHROMIUM, LivePage, played, serving

from slora_jax.serving.http.page import page_files
from slora_jax.serving.observability.snapshot import PAGE_KINDS

HOSTILE = ["<img src=x onerror=alert(1)>", "</td><script>alert(2)</script>", '"><svg onload=alert(3)>', "a" * 300]
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")


def adapters(count: int) -> list[dict[str, object]]:
    now = time.time()
    names = HOSTILE + [f"adapter-{n}" for n in range(count - len(HOSTILE))]
    fixed = {"aliases": [], "rank": 8, "pages": 4, "bytes": 2048, "prompt_tokens": 10, "queue_seconds_last": 0.5}
    return [
        fixed
        | {"name": name, "digest": f"{n:064x}", "state": "pinned" if n % 2 else "disk", "last_used": now - n}
        | {"requests": n + 1, "generated_tokens": 1000 + n, "queue_seconds_mean": 0.5 / (n + 1)}
        for n, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def page():
    moments = recording().moments
    busy = 250 + int(np.argmax([len(moment.loading) * 100 + len(moment.used) for moment in moments[250:400]]))
    live = LivePage(played(recording(), busy).to_json("ready"), moments[busy].kinds.tobytes(), adapters(250))
    with serving(live):
        yield live


@pytest.fixture
def fresh(page):
    """The page; changes are undone afterwards."""
    before = dict(vars(page))
    page.asked = []
    yield page
    vars(page).update(before)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def assert_shows(report, page: LivePage) -> None:
    state, text = page.state, report["text"]
    assert report["status"] == "ready" and report["hidden"]["notice"] and not report["hidden"]["main"]
    assert {kind: number(text[f"kind-{kind}"]) for kind in PAGE_KINDS} == state["pool"]["kinds"]
    assert report["painted"] == {kind: n for kind, n in state["pool"]["kinds"].items() if n}
    for name in ("running", "waiting"):
        assert number(text[f"now-{name}"]) == state["queue"][name]
    for name, seconds in state["latency"].items():
        if name != "window_seconds":
            shown, unit = text[f"now-{name}"].split()
            assert float(shown) * {"ms": 1e-3, "s": 1}[unit] == pytest.approx(seconds, rel=5e-3)
    assert {s: number(text[f"state-{s}"]) for s in state["adapters"]["states"]} == state["adapters"]["states"]
    assert number(text["registered"]) == state["adapters"]["registered"]
    assert number(text["total-finished"]) == state["totals"]["finished"] > 0
    assert len(report["lines"]) == 7 and min(report["lines"]) > 100
    assert len(report["pictures"]) == 6 and all(re.search(r"\d", label) for label in report["pictures"])


@browser
@pytest.mark.parametrize(
    ("width", "flags", "ground"),
    [
        (1300, [], "rgb(246, 247, 249)"),
        (390, ["--blink-settings=preferredColorScheme=0"], "rgb(16, 20, 25)"),
    ],
    ids=["desk", "phone, dark"],
)
def test_page_shows_the_state(fresh, tmp_path, width, flags, ground) -> None:
    report, console = fresh.open(tmp_path, width, *flags)
    assert_shows(report, fresh)
    assert console == [] and report["beyond"] == [] and report["ground"] == ground
    assert report["origins"] == [fresh.address]
    assert set(fresh.asked) == {"/harness", "/", "/page.css", "/page.js", "/icon.svg", "/state", "/state/pages",
                                "/v1/adapters"}  # fmt: skip
    assert fresh.asked.count("/state") >= 3  # it keeps polling
    names = [row[0] for row in report["rows"]]
    assert names == [one["name"] for one in fresh.adapters[:200]]  # hostile ones first, as text
    assert report["elements"] == ["SPAN", "TD", "TR"]
    assert report["rows"][1][1] == "in the pool, in use" and report["rows"][1][7] == "1,001"
    assert report["text"]["shown"] == "200 of 250, those used last"
    before_last = PAGE_KINDS[fresh.kinds[298]].split("_")[0]
    assert re.match(f"Page 298: {before_last}", report["text"]["page-told"], re.I)  # by the arrow keys


@browser
def test_page_asks_for_a_key_and_finds_adapters(fresh, tmp_path) -> None:
    fresh.key = "secret"
    report, _ = fresh.open(tmp_path, 1300, key="secret", search="onload")
    assert report["hidden"]["key-form"]
    assert_shows(report, fresh)
    assert [row[0] for row in report["rows"]] == [HOSTILE[2]] and report["text"]["shown"] == "1 found"
    report, _ = fresh.open(tmp_path, 1300, key="wrong")
    assert report["status"] == "key" and "refused" in report["text"]["key-why"] and report["rows"] == []


@browser
def test_page_answers_a_prompt_and_shows_left_out_adapters_and_aliases(fresh, tmp_path) -> None:
    fresh.refused = {"bad <i>one</i>": "no weights"}
    fresh.adapters = [fresh.adapters[4] | {"aliases": ["twin", "third"]}, *fresh.adapters[:2]]
    report, console = fresh.open(tmp_path, 390, prompt="Hi & bye")
    assert console == [] and report["beyond"] == []
    assert report["text"]["try-answer"] == "You said <b>Hi & bye</b>." and report["text"]["try-send"] == "Send"
    assert not report["hidden"]["refused-box"] and report["text"]["refused"] == "bad <i>one</i>: no weights"
    assert report["rows"][0][0] == "adapter-0 (also twin, third)"


@browser
def test_page_names_the_replicas(fresh, tmp_path) -> None:
    fresh.state = fresh.state | {"replica": 0}
    fresh.adapters = [
        fresh.adapters[5] | {"replica": rank, "state": state} for rank, state in ((1, "device"), (0, "disk"))
    ]
    report, console = fresh.open(tmp_path, 390)
    assert console == [] and report["text"]["model"] == "tiny-llama, replica 0"
    assert [row[1] for row in report["rows"]] == ["in the pool, idle, replica 1", "on disk, replica 0"]


@browser
def test_pool_of_180_000_pages_is_drawn(fresh, tmp_path) -> None:
    kinds = np.random.default_rng(0).integers(0, 7, 180_000).astype(np.uint8)
    kinds[0] = 7
    fresh.kinds = kinds.tobytes()
    counts = dict(zip(PAGE_KINDS, np.bincount(kinds).tolist(), strict=True))
    fresh.state = fresh.state | {"pool": {"pages": 180_000, "kinds": counts}}
    report, console = fresh.open(tmp_path, 1300)
    assert_shows(report, fresh)
    assert console == [] and report["text"]["pool-pages"] == "180,000"


@browser
@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"key": "secret"}, "key", ""),
        ({"failing": True}, "lost", "status 500"),
        ({"state": "starting"}, "starting", "is starting"),
        ({"state": "draining"}, "draining", "accepts nothing new"),
        ({"state": "failed"}, "failed", "The engine has failed: the server accepts nothing. <b>step</b>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_page_reports_problems(fresh, tmp_path, change, status, says) -> None:
    if "state" in change:
        empty = {"pool": None, "queue": None, "adapters": None, "totals": None} if status == "starting" else {}
        change = {"state": fresh.state | empty | {"status": status, "detail": "<b>step</b>"}}
    vars(fresh).update(change)
    report, _ = fresh.open(tmp_path, 390)
    assert report["status"] == status and says in report["text"]["notice"]
    assert report["hidden"]["key-form"] == (status != "key")
    assert report["hidden"]["main"] == (status in ("key", "lost", "starting"))
    if status == "key":
        assert fresh.asked.count("/state") == 1  # it waits for the key


def test_page_has_no_external_resource_and_no_inline_script() -> None:
    files = page_files()
    assert set(files) == {"index.html", "page.css", "page.js", "icon.svg"}
    page = files["index.html"][0].decode()
    assert not re.findall(r'(?:src|href)="(?:https?:|//|data:)', page) and not re.findall(
        r"<script>|style=| on\w+=", page
    )
    script = files["page.js"][0].decode()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
