"""Hostile requests each get the right status and a short standard error, and harm no other request."""

from __future__ import annotations

import json
import urllib.request

import pytest
from live_server import MANAGE_KEY, SERVE_KEY
from unharmed import refused
from wire import CLOSED, connect, exchange, head, post, read_replies, read_reply

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
BODY_BYTES, HEADER_BYTES = 1 << 20, 64 << 10
OK = {"prompt": "x", "max_tokens": 2}
MESSAGES = [{"role": "user", "content": "x"}]

pytestmark = pytest.mark.usefixtures("unharmed", "still_answers")


# Bodies


BODIES = [
    (b'{"prompt": "x"', "not valid JSON"),
    (b"{'prompt': 'x'}", "not valid JSON"),
    (b'{"prompt": "a\x00b"}', "not valid JSON"),
    (b'{"prompt": "x"} {"prompt": "y"}', "not valid JSON"),
    (b'{"prompt": "\xff\xfe"}', "UTF-8"),
    (b'{"prompt": "\xed\xa0\x80"}', "is not valid Unicode"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"prompt":' * 10_000 + b"1" + b"}" * 10_000, "nested too deep"),
    (b'{"prompt": "x", "chat_template_kwargs": ' + b"[" * 900 + b"]" * 900 + b"}", "unknown field"),
    (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "prompt"),
    (b'{"prompt": "x", "n": ' + b"1" * 10_000 + b"}", "a number too long"),
    (b'{"prompt": "x", "n": ' + b"1" * 4_000 + b"}", "n="),
    (b'{"prompt": "x", "temperature": NaN}', "temperature=nan"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature=inf"),
    (b'{"prompt": "x", "top_p": -Infinity}', "top_p=-inf"),
    (b'{"prompt": "x", "temperature": "1"}', "temperature='1'"),
    (b'{"prompt": "x", "stream": "yes"}', "stream='yes'"),
    (b'{"prompt": "x", "seed": 1.5}', "seed=1.5"),
    (b'{"prompt": {"a": 1}}', "prompt={'a': 1}"),
    (b'{"prompt": true}', "prompt"),
    (b"", "the body is missing"),
    (b"null", "the body"),
    (b"[]", "the body"),
    (b'"x"', "the body"),
    (b"17", "the body"),
    (b'{"prompt": "x", "logit_bias": {"5": 101}}', "logit_bias"),
    (b'{"prompt": "x", "guided_json": ' + b'{"items":' * 200 + b"{}" + b"}" * 201, "guided_json="),
    (b'{"prompt": "x", "guided_regex": "' + b"(" * 9_000 + b")" * 9_000 + b'"}', "guided_regex="),
    (b'{"prompt": "x", "guided_regex": "' + b"a" * 900_000 + b'"}', "guided_regex="),
    (b'{"prompt": "x", "stop": [1]}', "stop"),
    (b'{"prompt": "x", "' + b"k" * 900_000 + b'": 1}', "unknown field"),
    (b'{"prompt": "x", "model": "' + b"m" * 900_000 + b'"}', "model="),
]


def test_invalid_body_is_400_and_says_why(server) -> None:
    for body, words in BODIES:
        assert words in refused(server, post(COMPLETIONS, body, SERVE_KEY), 400), body[:50]


def test_last_of_duplicate_keys_counts(server) -> None:
    body = b'{"prompt": "x", "max_tokens": 3, "max_tokens": 1, "ignore_eos": true}'
    assert exchange(server, post(COMPLETIONS, body, SERVE_KEY)).json["usage"]["completion_tokens"] == 1


def many(start: bytes, item: bytes, end: bytes) -> bytes:
    """A body that is nearly as long as it may be."""
    room = BODY_BYTES - len(start) - len(end)
    return start + b",".join([item] * (room // (len(item) + 1))) + end


LARGE = [
    (COMPLETIONS, many(b'{"prompt":[', b"1.5", b"]}"), "at most 4096"),
    (COMPLETIONS, many(b'{"prompt":[', b"1", b"]}"), "max_model_len"),
    (COMPLETIONS, many(b'{"prompt":[', b'""', b"]}"), "at most 4096"),
    (COMPLETIONS, many(b'{"n":128,"prompt":[', b'"a"', b"]}"), "at most 4096"),
    (COMPLETIONS, b'{"n":128,"prompt":["a"' + b',"a"' * 4000 + b"]}", "prompts times n is 512128"),
    (COMPLETIONS, many(b'{"prompt":[', b"[1]", b"]}"), "at most 4096"),
    (COMPLETIONS, many(b'{"prompt":[', b"{}", b"]}"), "at most 4096"),
    (COMPLETIONS, many(b'{"prompt":"x","stop":[', b'""', b"]}"), "stop.0"),
    (COMPLETIONS, many(b'{"prompt":"x","stop_token_ids":[', b"7", b"]}"), "at most 256"),
    (COMPLETIONS, b'{"prompt":"' + b"a b " * 250_000 + b'"}', "max_model_len"),
    (COMPLETIONS, b'{"prompt":"x"' + b"".join(b',"%d":0' % i for i in range(80_000)) + b"}", "80001 fields"),
    (CHAT, many(b'{"messages":[', b"0", b"]}"), "at most 10000"),
    (CHAT, many(b'{"messages":[', b'{"role":"u","content":"x"}', b"]}"), "at most 10000"),
    (CHAT, b'{"messages":[' + b",".join([b'{"role":"u","content":"x"}'] * 9_000) + b"]}", "max_model_len"),
    (CHAT, b'{"messages":[{"role":"u","content":"' + b"a b " * 250_000 + b'"}]}', "max_model_len"),
    (CHAT, b'{"messages":[{"role":"' + b"r" * 900_000 + b'","content":"x"}]}', "messages.0.role"),
    (CHAT, many(b'{"messages":[{"role":"u","content":[', b"{}", b"]}]}"), "at most 10000"),
    (CHAT, many(b'{"messages":[{"role":"u","content":"x"}],"tools":[', b"1", b"]}"), "tools"),
    (
        CHAT,
        b'{"messages":[{"role":"u"}],"metadata":{"":0' + b"".join(b',"%d":0' % i for i in range(80_000)) + b"}}",
        "at most 16",
    ),
    (
        CHAT,
        b'{"messages":[{"role":"u"}],"logit_bias":{"":""' + b"".join(b',"%d":""' % i for i in range(70_000)) + b"}}",
        "logit_bias",
    ),
]


def test_megabyte_of_items_is_refused_without_memory_growth(server) -> None:
    """An error for each item, or a sequence for each, would take gigabytes and minutes."""
    for path, body, words in LARGE:
        assert len(body) <= BODY_BYTES
        memory = server.psutil().memory_info().rss
        assert words in refused(server, post(path, body, SERVE_KEY), 400), body[:50]
        assert server.psutil().memory_info().rss - memory < 256 << 20, body[:50]


FIELDS = ["model", "prompt", "stop", "suffix", "nonsense", "\ud800"]


def test_half_of_a_surrogate_pair_is_refused_in_any_field(server) -> None:
    for field in FIELDS:
        refused(server, post(COMPLETIONS, OK | {field: "\udfff"}, SERVE_KEY), 400)


CHATS = [
    {"messages": [{"role": "\ud800", "content": "x"}]},
    {"messages": [{"role": "user", "content": "\ud800"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
    {"messages": [{"role": "user", "content": "x", "name": "\ud800"}]},
    {"chat_template_kwargs": {"messages": 1}},
    {"chat_template_kwargs": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}},
    {"chat_template_kwargs": {"conversation": []}},
    {"chat_template_kwargs": {"tokenize": True}},
    {"chat_template_kwargs": {"tools": [{}], "documents": [{}]}},
    {"chat_template_kwargs": {str(i): i for i in range(1000)}},
    {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
]


def test_chat_that_could_change_the_template_is_refused(server) -> None:
    for change in CHATS:
        refused(server, post(CHAT, {"messages": MESSAGES, "max_tokens": 1} | change, SERVE_KEY), 400)


def test_message_is_not_run_as_a_template(server) -> None:
    """It would run for ever."""
    loop = "{% for i in range(10**9) %}{{ i }}{% endfor %}"
    answer = exchange(server, post(CHAT, {"messages": [{"role": loop, "content": loop}], "max_tokens": 1}, SERVE_KEY))
    assert answer.status in (200, 400) and "10**9" not in answer.body.decode()


def test_body_of_a_client_without_a_key_is_not_read(server) -> None:
    start = head("POST", COMPLETIONS, "wrong", "Content-Length: 1000000", "Content-Type: application/json")
    reply = exchange(server, start + b"\r\n")  # a server that waits for the body answers 408
    assert reply.status == 401 and "key" in reply.message


# Types of content, lengths


CONTENT_TYPES = ["text/plain", None, "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", ""]


def test_other_content_types_are_refused(server) -> None:
    """A page of another site can make a browser send anything else."""
    for kind in CONTENT_TYPES:
        assert "Content-Type: application/json" in refused(server, post(COMPLETIONS, OK, SERVE_KEY, kind), 400)
        path = post(LOAD, {"lora_name": "x", "lora_path": "adapter-0"}, MANAGE_KEY, kind)
        assert "Content-Type: application/json" in refused(server, path, 400)


def test_body_beyond_its_limit_is_413(server) -> None:
    body = post(COMPLETIONS, b"x" * (8 * BODY_BYTES), SERVE_KEY)
    assert "limits.body_bytes" in refused(server, body, 413)
    fields = ("Transfer-Encoding: chunked", "Content-Type: application/json")
    chunks = (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 40
    assert "limits.body_bytes" in refused(server, head("POST", COMPLETIONS, SERVE_KEY, *fields) + b"\r\n" + chunks, 413)
    declared = head("POST", COMPLETIONS, SERVE_KEY, "Content-Length: 99999999999", "Expect: 100-continue")
    assert "limits.body_bytes" in refused(server, declared + b"\r\n", 413)


def test_connection_survives_a_refused_body(server) -> None:
    with connect(server) as client:
        client.sendall(post(COMPLETIONS, b"x" * (2 * BODY_BYTES), SERVE_KEY) + post(COMPLETIONS, OK, SERVE_KEY))
        assert [reply.status for reply in read_replies(client, 2)] == [413, 200]


def test_chunked_body_is_read(server) -> None:
    data = json.dumps(OK).encode()
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in data) + b"0\r\n\r\n"
    fields = ("Transfer-Encoding: chunked", "Content-Type: application/json")
    assert exchange(server, head("POST", COMPLETIONS, SERVE_KEY, *fields) + b"\r\n" + chunks).status == 200


LINES = {
    "two lengths": "Content-Length: 2\r\nContent-Length: 3",
    "negative length": "Content-Length: -1",
    "length with a sign": "Content-Length: +2",
    "length in hexadecimal": "Content-Length: 0x2",
    "length beyond 64 bits": "Content-Length: 99999999999999999999999",
    "length and chunks": "Content-Length: 2\r\nTransfer-Encoding: chunked",
    "chunks and length": "Transfer-Encoding: chunked\r\nContent-Length: 2",
    "chunks, then something": "Transfer-Encoding: chunked, identity",
    "nearly chunks": "Transfer-Encoding: xchunked",
    "chunks twice": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "space before the colon": "Content-Length : 2",
    "folded line": "X: a\r\n b",
    "no colon": "nonsense",
    "zero byte": "X: a\x00b",
    "bare line feed": "X: a\nContent-Length: 2",
    "bare carriage return": "X: a\rContent-Length: 2",
}


def test_ambiguous_head_is_refused(server) -> None:
    """Two servers could read it differently."""
    hidden = head("GET", "/v1/models", SERVE_KEY) + b"\r\n"
    for name, lines in LINES.items():
        data = head("POST", "/health", SERVE_KEY, *lines.split("\r\n")) + b"\r\n" + b"0\r\n\r\n" + hidden
        reply = exchange(server, data)
        assert reply.status == 400 and reply.headers["connection"] == "close" and reply.message, name


OTHER_PROTOCOLS = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"GET /health HTTP/9.9\r\n\r\n",
    b"GET /health HTTP/1.1 extra\r\n\r\n",
    b"BREW /health HTTP/1.1\r\n\r\n",
    b"CONNECT evil:443 HTTP/1.1\r\n\r\n",
    b"GET /h\xc3\xa9alth HTTP/1.1\r\n\r\n",
    bytes(range(256)) * 10,
    b"\x00" * 100_000,
]


def test_other_protocol_is_refused(server) -> None:
    for data in OTHER_PROTOCOLS:
        refused(server, data, 400)


LARGE_HEADS = [
    head("GET", "/health", None) + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
    head("GET", "/health", None) + b"".join(b"X%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
    head("GET", "/" + "a" * 100_000, None) + b"\r\n",
    head("GET", "/v1/models?" + "a=b&" * 30_000, SERVE_KEY) + b"\r\n",
]


def test_head_beyond_its_limit_is_431(server) -> None:
    for data in LARGE_HEADS:
        reply = exchange(server, data)
        assert reply.status in (431, 0), reply  # 0: the rest of it came when the connection was closed already
        assert reply.status == 0 or "limits.header_bytes" in reply.message


def test_endless_head_is_cut_off(server) -> None:
    memory = server.psutil().memory_info().rss
    assert exchange(server, head("GET", "/health", None) + b"X: " + b"x" * (64 << 20)).status in (431, 0)
    assert server.psutil().memory_info().rss - memory < 16 << 20


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_upgrade_is_ignored(server, upgrade) -> None:
    fields = ("Connection: Upgrade", f"Upgrade: {upgrade}", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA")
    answer = exchange(server, head("GET", "/health", None, *fields) + b"\r\n")
    assert answer.status == 200 and answer.headers["connection"] == "close"


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_body_behind_an_upgrade_is_not_a_request(server, upgrade) -> None:
    """The parser would read it as the next request."""
    hidden = head("GET", "/v1/models", SERVE_KEY) + b"\r\n"
    fields = ("Connection: Upgrade", f"Upgrade: {upgrade}", f"Content-Length: {len(hidden)}")
    with connect(server) as client:
        client.sendall(head("POST", COMPLETIONS, SERVE_KEY, *fields) + b"\r\n")
        reply = read_reply(client)
        assert reply.status == 400 and "Upgrade" in reply.message and reply.headers["connection"] == "close"
        try:
            client.sendall(hidden)
        except ConnectionError:
            pass
        assert read_reply(client) == CLOSED


METHODS = ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND", "GET"]


def test_other_methods_are_405_with_the_right_one(server) -> None:
    for method in METHODS:
        reply = exchange(server, head(method, COMPLETIONS, SERVE_KEY) + b"\r\n")
        assert reply.status == 405 and reply.headers["allow"] == "POST" and method in reply.message


def test_head_is_get_without_a_body(server) -> None:
    for path in ("/health", "/ready", "/v1/models"):
        request = urllib.request.Request(server.url + path, method="HEAD")
        request.add_header("Authorization", f"Bearer {SERVE_KEY}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200 and answer.read() == b"" and int(answer.headers["Content-Length"]) > 0


# Paths of URLs


MODELS = [
    "..%2f..%2fetc%2fpasswd",
    "../../etc/passwd",
    "a%00b",
    "%zz%ff%ed%a0%80",
    "%0d%0aX-Evil:%20y",
    "a" * 60_000,
    "",
]


def test_unknown_model_is_404(server) -> None:
    for name in MODELS:
        reply = exchange(server, head("GET", f"/v1/models/{name}", SERVE_KEY) + b"\r\n")
        assert reply.status == 404 and reply.message and "x-evil" not in reply.headers


PATHS = ["/../../page.css", "/..%2fpage.css", "//etc/passwd", "/%00", "/page.css%00", "/" * 999]


def test_only_the_pages_own_files_are_served(server) -> None:
    for path in PATHS:
        refused(server, head("GET", path, SERVE_KEY) + b"\r\n", 404)


LIMITS = ["-1", "9" * 5000, "x", "1e3", "", "%00"]


def test_invalid_limit_is_400(server) -> None:
    for limit in LIMITS:
        refused(server, head("GET", f"/v1/adapters?limit={limit}", SERVE_KEY) + b"\r\n", 400)


# What a request may ask for


VALUES = [
    ({"prompt": ["a"] * 65, "n": 2}, "prompts times n is 130"),
    ({"n": 0}, "n=0"),
    ({"max_tokens": 2**70}, "max_tokens="),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 1001}, "stop"),
    ({"stop_token_ids": [2**31]}, "stop_token_ids"),
    ({"seed": 2**70}, "seed"),
    ({"top_k": -2}, "top_k"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [[5], [2**31 - 1]]}, "vocabulary"),
]


def test_values_beyond_their_range_are_refused(server) -> None:
    for change, words in VALUES:
        assert words in refused(server, post(COMPLETIONS, OK | change, SERVE_KEY), 400)
