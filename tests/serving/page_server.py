"""Serves the live page over a recorded run, under the server's policy, and opens it in a headless browser.

The page is in a frame of a harness page, which can be as narrow as a phone and whose script inspects it.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import urlencode

import uvicorn
from fastapi import FastAPI, Request, Response
from observed_engine import Recording

from slora_jax.serving.http.page import page_files
from slora_jax.serving.observability import live_state as state_module
from slora_jax.serving.observability.live_state import LiveState
from slora_jax.serving.observability.prometheus import ServerMetrics
from slora_jax.serving.observability.snapshot import PAGE_KINDS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = "default-src 'self'"
HARNESS = """<!doctype html><meta charset="utf-8"><link rel="icon" href="/icon.svg"><body style="margin:0">
<iframe id="page" src="/" style="border:0;display:block;width:WIDTHpx;height:HEIGHTpx"></iframe>
<script>
const asked = new URLSearchParams(location.search);
const type = (document, id, text) => {
  document.getElementById(id).value = text;
  document.getElementById(id).dispatchEvent(new Event("input"));
};
setTimeout(() => {
  const inside = document.getElementById("page").contentDocument;
  if (asked.get("search")) type(inside, "search", asked.get("search"));
  if (asked.get("key")) {
    type(inside, "key", asked.get("key"));
    inside.getElementById("key-form").requestSubmit();
  }
  if (asked.get("prompt")) {
    type(inside, "try-prompt", asked.get("prompt"));
    inside.getElementById("try-form").requestSubmit();
  }
}, 1500);
setTimeout(() => {
  const frame = document.getElementById("page"), inside = frame.contentDocument, view = frame.contentWindow;
  const style = view.getComputedStyle(inside.documentElement), canvas = inside.getElementById("pages");
  const names = asked.get("kinds").split(","), painted = {};
  const colours = Object.fromEntries(names.map(name => [style.getPropertyValue(`--${name}`).trim(), name]));
  const {columns, cell, pages} = canvas.dataset, {width, height} = canvas;
  const image = pages ? canvas.getContext("2d").getImageData(0, 0, width, height).data : [];
  for (let page = 0; page < Number(pages || 0); page += 1) {
    const half = Math.floor(cell * 0.4), x = page % columns * cell + half, y = Math.floor(page / columns) * cell + half;
    const at = (y * width + x) * 4;
    const hex = "#" + [...image.slice(at, at + 3)].map(one => one.toString(16).padStart(2, "0")).join("");
    painted[colours[hex] ?? hex] = (painted[colours[hex] ?? hex] ?? 0) + 1;
  }
  for (const key of ["End", "ArrowLeft"]) canvas.dispatchEvent(new view.KeyboardEvent("keydown", {key}));
  const right = inside.documentElement.clientWidth;
  const shown = [...inside.querySelectorAll("body *")].filter(one => one.clientWidth && !one.closest(".scroll, svg"));
  const report = {
    text: Object.fromEntries([...inside.querySelectorAll("[id]")].map(one => [one.id, one.textContent])),
    hidden: Object.fromEntries([...inside.querySelectorAll("[id]")].map(one => [one.id, one.hidden])),
    status: inside.getElementById("status").dataset.status,
    painted,
    rows: [...inside.querySelectorAll("#adapters tr")].map(row => [...row.cells].map(one => one.textContent)),
    elements: [...new Set([...inside.querySelectorAll("#adapters *")].map(one => one.tagName))].sort(),
    lines: [...inside.querySelectorAll(".plot .line")].map(one => one.getAttribute("d").length),
    pictures: [...inside.querySelectorAll("svg, canvas, .bar")].map(one => one.getAttribute("aria-label")),
    beyond: shown.filter(one => one.getBoundingClientRect().right > right + 0.5).map(one => one.outerHTML.slice(0, 90)),
    ground: view.getComputedStyle(inside.body).backgroundColor,
    origins: [...new Set(view.performance.getEntriesByType("resource").map(one => new URL(one.name).origin))],
  };
  const pre = document.createElement("pre");
  pre.id = "report";
  pre.textContent = JSON.stringify(report);
  if (asked.get("show") === null) document.body.append(pre);
}, 3500);
</script>"""


@dataclass
class LivePage:
    """An app with the page's files, and answers that a test may change. asked: paths of the requests so far."""

    state: dict[str, Any]
    kinds: bytes
    adapters: list[dict[str, Any]]
    refused: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    failing: bool = False
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def app(self) -> FastAPI:
        app, files = FastAPI(), page_files()

        @app.middleware("http")
        async def record(request: Request, answer: Any) -> Response:
            path = request.url.path
            self.asked.append(path)
            if path.startswith(("/state", "/v1")):
                if self.failing:
                    return Response("broken", 500)
                if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
                    return Response("no", 401)
            response = await answer(request)
            if path != "/harness":
                response.headers["Content-Security-Policy"] = POLICY
            return response

        @app.get("/harness")
        def harness(width: int, height: int) -> Response:
            text = HARNESS.replace("WIDTH", str(width)).replace("HEIGHT", str(height))
            return Response(text, media_type="text/html")

        @app.get("/state")
        def state() -> dict[str, Any]:
            return self.state

        @app.get("/state/pages")
        def pages() -> Response:
            return Response(self.kinds, media_type="application/octet-stream")

        @app.get("/v1/adapters")
        def adapters(limit: int, search: str) -> dict[str, Any]:
            found = [one for one in self.adapters if search in one["name"]]
            return {"object": "list", "data": found[:limit], "total": len(found), "refused": self.refused}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            text = f"You said <b>{body['messages'][0]['content']}</b>."
            events = [{"choices": [{"delta": {"content": text[i : i + 7]}}]} for i in range(0, len(text), 7)]
            lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            return Response(lines, media_type="text/event-stream")

        @app.get("/")
        def index() -> Response:
            return Response(*files["index.html"][:1], media_type=files["index.html"][1])

        @app.get("/{name}")
        def file(name: str) -> Response:
            content = files.get(name)
            return Response("", 404) if content is None else Response(content[0], media_type=content[1])

        return app

    def open(self, profile: Path, width: int, *flags: str, **typed: str) -> tuple[dict[str, Any], list[str]]:
        """Returns the harness' report of the page at this width, and the browser's console.

        Args:
          typed: a `key`, a `search` or a `prompt`, entered after 1.5 seconds.
        """
        query = urlencode({"width": width, "height": 1600, "kinds": ",".join(PAGE_KINDS), **typed})
        url = f"{self.address}/harness?{query}"
        errors, dom = browse(profile, url, "--dump-dom", *flags)
        report = re.search(r'<pre id="report">(.*?)</pre>', dom, re.S)
        assert report is not None, errors[-2000:]
        return json.loads(html.unescape(report[1])), re.findall(r"CONSOLE.*", errors)


def browse(profile: Path, url: str, *flags: str) -> tuple[str, str]:
    """Returns standard error and output of the browser."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1400,1700", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-first-run", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stderr, done.stdout


@contextmanager
def serving(page: LivePage) -> Iterator[LivePage]:
    """Serves the page on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(page.app(), host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        page.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield page
    finally:
        server.should_exit = True
        thread.join()


def played(recording: Recording, until: int, every: int = 4) -> LiveState:
    """Returns the state after a recorded run's first moments, as if it had taken `every` steps a second."""
    clock = SimpleNamespace(now=0.0)
    with mock.patch.object(state_module, "time", SimpleNamespace(monotonic=lambda: clock.now)):
        metrics = ServerMetrics(lambda: None)
        live = LiveState("tiny-llama", metrics)
        for number, moment in enumerate(recording.moments[: until + 1]):
            for output in moment.finished:
                metrics.finished(output)
            if number % every == 0 or number == until:
                clock.now += 1
                live.sample(moment.snapshot, moment.tiers)
    metrics.close()
    live._start = state_module.time.monotonic() - clock.now
    for sample in live._samples:
        sample.time += live._start
    return live
