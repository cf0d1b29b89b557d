// The live page: polls /state, /state/pages and /v1/adapters and shows the answers. Everything from the server is set as
// text, never as markup, because clients choose the names of adapters.
"use strict";

const KINDS = [
  ["free", "free"], ["kv", "KV of one request"], ["prefix_in_use", "prefix in use"], ["prefix_idle", "prefix idle"],
  ["adapter_in_use", "adapter in use"], ["adapter_idle", "adapter idle"], ["adapter_arriving", "adapter arriving"],
  ["dummy", "dummy page"],
];
const STATES = [
  ["pinned", "in the pool, in use"], ["device", "in the pool, idle"], ["loading", "on its way to the pool"],
  ["host", "in host memory"], ["disk", "on disk"],
];
const TOTALS = [
  ["finished", "requests finished", count], ["generated_tokens", "tokens generated", count],
  ["prefix_hit_tokens", "cached prompt tokens", count], ["preemptions", "preemptions", count],
  ["loads", "adapter loads", count], ["hits", "uses without a load", count], ["evictions", "adapter evictions", count],
  ["upload_bytes", "uploaded", bytes],
];
const CHARTS = [
  ["Requests", [["running", "running"], ["waiting", "waiting"]], count],
  ["Tokens per second", [["tokens_per_second", "generated"]], count],
  ["Time to first token", [["first_token_p50", "p50"], ["first_token_p95", "p95"]], seconds],
  ["Time between tokens", [["inter_token_p50", "p50"], ["inter_token_p95", "p95"]], seconds],
];
const NOTICES = {
  starting: "The server is starting: the model is loaded and its programs are compiled.",
  draining: "The server is draining: it finishes what it has accepted, and accepts nothing new.",
  failed: "The engine has failed: the server accepts nothing.",
};
const KEY = "slora-api-key", SECONDS_SHOWN = 120, MOST_ROWS = 200, LARGEST_CELL = 34, HIGHEST_POOL = 640;

const $ = id => document.getElementById(id);
const svg = (name, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const html = (name, className = "", text = "") => {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
};
const write = (element, text) => { if (element.textContent !== text) element.textContent = text; };

function count(value) {
  return value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}
function seconds(value) {
  if (value == null) return "–";
  if (value < 1) return `${Number((value * 1e3).toPrecision(3))} ms`;
  return value < 100 ? `${Number(value.toPrecision(3))} s` : span(value);
}
function span(value) {
  if (value < 60) return `${Math.floor(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  return value < 172800 ? `${Math.floor(value / 3600)} h` : `${Math.floor(value / 86400)} days`;
}
function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < 4) { value /= 1024; unit += 1; }
  return `${Number(value.toPrecision(3))} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

function ofReplica(answer) { // several replicas number their answers
  return answer.replica == null ? "" : `, replica ${answer.replica}`;
}

// Polling the server

let lastAnswer = null, asked = 0, timer = 0, polling = false;

class Refused extends Error {}

async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(5000) });
  if (response.status === 401 || response.status === 403) {
    throw new Refused(key ? "the server refused this one" : "this server asks for one");
  }
  if (!response.ok) throw new Error(`${path}: status ${response.status}`);
  return response;
}

function unlessRefused(error) { // the engine may be in a long step: keep the previous picture
  if (error instanceof Refused) throw error;
}

async function poll() {
  clearTimeout(timer);
  if (polling || document.hidden) return;
  polling = true;
  let again = 1000;
  try {
    const state = await (await ask("state")).json();
    showState(state);
    const pages = state.pool && await ask("state/pages").catch(unlessRefused);
    if (pages) showPages(new Uint8Array(await pages.arrayBuffer()));
    if (state.pool && asked++ % 3 === 0) await showAdapters();
    lastAnswer = Date.now();
    $("key-form").hidden = true;
    delete $("main").dataset.stale;
  } catch (error) {
    $("main").dataset.stale = "";
    if (error instanceof Refused) {
      again = 0;
      askForKey(error.message);
    } else {
      const since = lastAnswer ? ` for ${span((Date.now() - lastAnswer) / 1000)}` : "";
      showStatus("lost", "connection lost", `No answer from the server${since}; asking again every second. (${error.message})`);
    }
  } finally {
    polling = false;
  }
  if (again) timer = setTimeout(poll, again);
}

function askForKey(why) {
  showStatus("key", "API key needed", "");
  write($("key-why"), `(${why})`);
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

$("key-form").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  poll();
});
document.addEventListener("visibilitychange", poll);

// Status, totals, adapters by state

function showStatus(status, text, notice) {
  $("status").dataset.status = $("notice").dataset.status = status;
  write($("status"), text);
  write($("notice"), notice);
  $("notice").hidden = !notice;
}

function showState(state) {
  const why = NOTICES[state.status] || "";
  showStatus(state.status, state.status, why && state.detail ? `${why} ${state.detail}` : why);
  write($("model"), state.model + ofReplica(state));
  document.title = `${state.model} · slora-jax`;
  write($("uptime"), `up ${span(state.uptime_seconds)}`);
  $("main").hidden = !state.pool;
  if (!state.pool) return;
  showCharts(state);
  const total = Object.values(state.adapters.states).reduce((sum, one) => sum + one, 0);
  write($("registered"), count(state.adapters.registered));
  write($("contents"), count(total));
  for (const [name] of STATES) {
    const number = state.adapters.states[name];
    write($(`state-${name}`), count(number));
    $(`part-${name}`).style.width = `${total ? (100 * number) / total : 0}%`;
  }
  $("states").setAttribute("aria-label", "Adapters: " + told(STATES, state.adapters.states));
  for (const [name, , format] of TOTALS) write($(`total-${name}`), format(state.totals[name]));
}

const told = (names, counts) =>
  names.filter(([name]) => counts[name]).map(([name, text]) => `${count(counts[name])} ${text}`).join(", ");

function legend(list, names, prefix) {
  for (const [name, text] of names) {
    const item = html("li"), number = html("b", "", "0");
    number.id = `${prefix}-${name}`;
    item.append(html("span", `swatch ${name}`), text, number);
    list.append(item);
  }
}

// The pool, page by page

let kinds = new Uint8Array(0), grid = { columns: 1, rows: 0, cell: 1, gap: 0, scale: 1 }, chosen = -1;

function showPages(received) {
  kinds = received;
  const counts = Object.fromEntries(KINDS.map(([name]) => [name, 0]));
  for (const kind of kinds) counts[KINDS[kind][0]] += 1;
  for (const [name] of KINDS) write($(`kind-${name}`), count(counts[name]));
  write($("pool-pages"), count(kinds.length));
  write($("pool-used"), count(counts.kv + counts.prefix_in_use + counts.adapter_in_use));
  $("pages").setAttribute("aria-label", `${count(kinds.length)} pages: ${told(KINDS, counts)}`);
  paint();
}

function fit(pages, width) {
  // Large square cells, in device pixels, with which all pages fit, in rows of nearly the same length.
  const scale = window.devicePixelRatio || 1, widest = Math.floor(width * scale);
  const highest = Math.min(HIGHEST_POOL, Math.max(320, width)) * scale;
  let cell = Math.round(LARGEST_CELL * scale), rows = 1;
  for (; cell >= 1; cell -= 1) {
    rows = Math.ceil(pages / Math.max(1, Math.floor(widest / cell)));
    if (cell === 1 || rows * cell <= highest) break;
  }
  const columns = Math.max(1, Math.ceil(pages / rows));
  cell = Math.max(cell, Math.min(Math.floor(widest / columns), Math.floor(highest / rows), Math.round(cell * 1.4)));
  return { columns, rows, cell, gap: cell >= 16 ? 3 : cell >= 8 ? 2 : cell >= 4 ? 1 : 0, scale };
}

function palette() {
  const style = getComputedStyle(document.documentElement);
  return Uint32Array.from(KINDS, ([name]) => {
    const hex = style.getPropertyValue(`--${name}`).trim();
    const [red, green, blue] = [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
    return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0; // as bytes: red, green, blue, opaque
  });
}

function paint() {
  const canvas = $("pages"), colours = palette();
  grid = fit(kinds.length, $("pool").clientWidth);
  const { columns, rows, cell, gap, scale } = grid, side = cell - gap;
  const width = Math.min(columns, kinds.length) * cell, height = rows * cell;
  if (canvas.width !== width || canvas.height !== height) {
    [canvas.width, canvas.height] = [width, height];
    canvas.style.width = `${width / scale}px`;
    canvas.style.height = `${height / scale}px`;
  }
  if (!width || !height) return;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let page = 0; page < kinds.length; page += 1) {
    const colour = colours[kinds[page]], corner = (Math.floor(page / columns) * width + (page % columns)) * cell;
    for (let y = 0; y < side; y += 1) {
      const cut = side > 6 && (y === 0 || y === side - 1) ? 1 : 0; // corners a little round
      pixels.fill(colour, corner + y * width + cut, corner + y * width + side - cut);
    }
  }
  context.putImageData(image, 0, 0);
  Object.assign(canvas.dataset, { columns, cell, pages: kinds.length });
  tell();
}

function tell() {
  const mark = $("page-mark");
  mark.hidden = chosen < 0 || chosen >= kinds.length;
  if (mark.hidden) return;
  const { columns, cell, gap, scale } = grid, size = Math.max((cell - gap) / scale, 7);
  const middle = at => (at * cell + (cell - gap) / 2) / scale;
  mark.style.left = `${middle(chosen % columns) - size / 2 - 2}px`;
  mark.style.top = `${middle(Math.floor(chosen / columns)) - size / 2 - 2}px`;
  mark.style.width = mark.style.height = `${size + 4}px`;
  write($("page-told"), `Page ${count(chosen)}: ${KINDS[kinds[chosen]][1]}`);
}

function choose(page) {
  chosen = Math.max(0, Math.min(kinds.length - 1, page));
  tell();
}

$("pages").addEventListener("pointermove", event => {
  const at = coordinate => Math.floor((coordinate * grid.scale) / grid.cell);
  const column = at(event.offsetX), page = at(event.offsetY) * grid.columns + column;
  if (column >= 0 && column < grid.columns && page >= 0 && page < kinds.length) choose(page);
});
$("pages").addEventListener("pointerleave", () => { chosen = -1; tell(); });
$("pages").addEventListener("keydown", event => {
  const { columns } = grid;
  const to = {
    ArrowRight: chosen + 1, ArrowLeft: chosen - 1, ArrowDown: chosen + columns, ArrowUp: chosen - columns,
    Home: 0, End: kinds.length - 1,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(to);
});

// Charts of the last two minutes

let lastState = null;

function showCharts(state) {
  lastState = state;
  const { history } = state, now = { ...state.latency, ...state.queue, tokens_per_second: history.tokens_per_second.at(-1) };
  CHARTS.forEach(([title, series, format], index) => {
    for (const [name] of series) write($(`now-${name}`), format(now[name]));
    plot($(`plot-${index}`), title, series, format, history);
  });
}

function plot(picture, title, series, format, history) {
  const width = picture.clientWidth || 300, height = picture.clientHeight || 120;
  const [left, right, top, bottom] = [1, width - 1, 14, height - 18];
  const known = series.flatMap(([name]) => history[name]).filter(value => value != null);
  const highest = nice(Math.max(0, ...known));
  const x = age => right - (Math.min(age, SECONDS_SHOWN) / SECONDS_SHOWN) * (right - left);
  const y = value => bottom - (value / highest) * (bottom - top);
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.replaceChildren();
  for (const value of [0, highest / 2, highest]) {
    picture.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
  }
  const label = (text, attributes) => {
    const element = svg("text", attributes);
    element.textContent = text;
    picture.append(element);
  };
  label(format(highest), { x: left, y: top - 4 });
  label("2 min ago", { x: left, y: height - 4 });
  label("now", { x: right, y: height - 4, "text-anchor": "end" });
  series.forEach(([name], index) => {
    const points = history[name].map((value, at) => value == null ? null : [x(history.age_seconds[at]), y(value)]);
    const colour = index ? "second" : "first";
    let line = "", area = "", start = null, last = null;
    const close = () => { if (last) area += `L${last[0]} ${bottom}L${start[0]} ${bottom}Z`; };
    for (const point of points) {
      if (point && last) { line += `L${point[0]} ${point[1]}`; area += `L${point[0]} ${point[1]}`; }
      if (point && !last) { start = point; line += `M${point[0]} ${point[1]}`; area += `M${point[0]} ${point[1]}`; }
      if (!point) close();
      last = point;
    }
    close();
    if (!index) picture.append(svg("path", { class: "area first", d: area }));
    picture.append(svg("path", { class: `line ${colour}`, d: line }));
  });
  const values = series.map(([name, text]) => `${text} ${$(`now-${name}`).textContent}`).join(", ");
  picture.setAttribute("aria-label", `${title}: ${values}; at most ${format(known.length ? Math.max(...known) : null)} in two minutes`);
}

function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(step => step * power >= value) * power;
}

// The table of adapters

let asking = 0;

async function showAdapters() {
  const wanted = $("search").value.trim(), number = ++asking;
  const query = new URLSearchParams({ limit: MOST_ROWS, search: wanted });
  const answer = await (await ask(`v1/adapters?${query}`)).json();
  if (number !== asking) return; // a later search has started
  const contains = text => text.toLowerCase().includes(wanted.toLowerCase());
  const found = answer.data.filter(one => contains(one.name) || contains(one.digest)).slice(0, MOST_ROWS);
  const total = Math.max(answer.total ?? 0, found.length);
  write($("shown"), found.length < total ? `${count(found.length)} of ${count(total)}, those used last` : `${count(total)} found`);
  const body = $("adapters"), names = Object.fromEntries(STATES);
  while (body.rows.length > found.length) body.deleteRow(-1);
  found.forEach((one, at) => {
    const row = body.rows[at] || newRow(body), cells = row.cells;
    const text = one.aliases.length ? `${one.name} (also ${one.aliases.join(", ")})` : one.name;
    write(cells[0], text);
    cells[0].title = text;
    const [swatch, state] = cells[1].firstChild.children;
    swatch.className = `swatch ${one.state in names ? one.state : ""}`;
    write(state, (names[one.state] || String(one.state)) + ofReplica(one));
    const used = one.last_used == null ? "never" : `${span(Math.max(0, Date.now() / 1000 - one.last_used))} ago`;
    const figures = [count(one.rank), count(one.pages), bytes(one.bytes), used, count(one.requests),
      count(one.generated_tokens), seconds(one.queue_seconds_mean), one.digest.slice(0, 12)];
    figures.forEach((figure, column) => write(cells[column + 2], figure));
  });
  const refused = Object.entries(answer.refused ?? {});
  write($("refused-count"), count(refused.length));
  $("refused-box").hidden = !refused.length;
  $("refused").replaceChildren(...refused.slice(0, MOST_ROWS).map(([name, why]) => html("li", "", `${name}: ${why}`)));
  if (!wanted) {
    const offered = new Set(found.map(one => one.name)); // each once for several replicas
    $("try-models").replaceChildren(...[...offered].map(value => Object.assign(html("option"), { value })));
  }
}

// A prompt and its streamed answer

let answering = null; // aborts the answer under way

async function post(path, body) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal: answering.signal });
}

async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event.choices[0]?.delta?.content ?? event.choices[0]?.text ?? "";
    }
  }
}

async function answer() {
  const prompt = $("try-prompt").value, model = $("try-model").value.trim();
  const asked = { ...(model ? { model } : {}), stream: true, max_tokens: 256 };
  let response = await post("v1/chat/completions", { ...asked, messages: [{ role: "user", content: prompt }] });
  let problem = response.ok ? null : (await response.json()).error;
  if (problem?.code === "no_chat_template") { // not a chat model: continue the text
    response = await post("v1/completions", { ...asked, prompt });
    problem = response.ok ? null : (await response.json()).error;
  }
  if (problem) throw new Error(problem.message);
  for await (const text of pieces(response)) $("try-answer").append(text);
}

$("try-form").addEventListener("submit", async event => {
  event.preventDefault();
  if (answering) { answering.abort(); return; }
  answering = new AbortController();
  $("try-answer").hidden = false;
  $("try-answer").replaceChildren();
  $("try-answer").classList.remove("wrong");
  write($("try-send"), "Stop");
  try {
    await answer();
  } catch (error) {
    if (error.name !== "AbortError") {
      $("try-answer").append(error.message);
      $("try-answer").classList.add("wrong");
    }
  } finally {
    answering = null;
    write($("try-send"), "Send");
  }
});

function newRow(body) {
  const row = body.insertRow();
  for (let column = 0; column < 10; column += 1) row.insertCell().className = column > 1 && column < 9 ? "number" : "";
  row.cells[9].className = "digest";
  const tag = html("span", "tag");
  tag.append(html("span", "swatch"), html("span"));
  row.cells[1].append(tag);
  return row;
}

let typing = 0;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => showAdapters().catch(() => {}), 200); // the next poll shows the error
});

// Built once

legend($("pool-legend"), KINDS, "kind");
legend($("states-legend"), STATES, "state");
for (const [name] of STATES) {
  const part = html("div", name);
  part.id = `part-${name}`;
  $("states").append(part);
}
for (const [name, text] of TOTALS) {
  const entry = html("div"), value = html("dd");
  value.id = `total-${name}`;
  entry.append(html("dt", "", text), value);
  $("totals").append(entry);
}
CHARTS.forEach(([title, series], index) => {
  const card = html("div", "card"), values = html("ul", "chart-values");
  series.forEach(([name, text], at) => {
    const item = html("li"), value = html("span", "value", "–");
    value.id = `now-${name}`;
    item.append(html("span", `swatch ${at ? "second" : "first"}`), value, html("span", "quiet", text));
    values.append(item);
  });
  card.append(html("h3", "", title), values, svg("svg", { class: "plot", id: `plot-${index}`, role: "img" }));
  $("charts").append(card);
});
const again = () => {
  paint();
  if (lastState) showCharts(lastState);
};
addEventListener("resize", again);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
poll();
