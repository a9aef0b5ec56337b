"""What a server refuses: foreign pages, other names, no token, too much of anything."""

import asyncio
import dataclasses
import json

import pytest
from starlette.exceptions import HTTPException

from packforcing.app.server.safety import Access, Guard, Limits, own_hosts

TOKEN = "a secret of many letters"
HOSTS = own_hosts("127.0.0.1", ["Box.Example.org."])
LOCAL = {"host": "127.0.0.1:8000"}


def ask(guard, path="/v1/videos", headers=LOCAL, method="GET", body=(b"",), **scope):
    """Return status, headers and body of an answer, over no socket."""
    sent, parts = [], [*body]

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    path, _, query = path.partition("?")
    pairs = headers.items() if isinstance(headers, dict) else headers
    whole = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(),
        "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000), "http_version": "1.1",
        "headers": [(name.encode(), value.encode()) for name, value in pairs],
    } | scope  # fmt: skip
    asyncio.run(guard(whole, receive, send))
    if sent[0]["type"] == "websocket.close":
        return sent[0]["code"], {}, None
    answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answer, sent[1]["body"]


async def application(scope, receive, send):
    """Read the whole body and answer 200."""
    more = scope["type"] == "http"
    while more:
        more = (await receive())["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"let through"})


def guard(token=None, **limits):
    return Guard(application, Access(HOSTS, token), dataclasses.replace(Limits(), **limits))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LocalHost.:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7:8000", 200),
        ("box.example.org", 200),
        ("attacker.example", 421),  # a name that DNS leads here
        ("127.0.0.1.attacker.example", 421),
        ("localhost.attacker.example:8000", 421),
        ("localhost@attacker.example", 421),
        ("0x7f.1", 421),
        ("2130706433", 421),
        ("::1", 421),
        ("[127.0.0.1]", 421),
        ("localhost:8000:8000", 421),
        ("", 421),
    ],
)
def test_a_host_that_is_not_this_server_is_refused(host, status):
    assert ask(guard(), headers={"host": host})[0] == status


def test_a_request_has_one_host():
    assert ask(guard(), headers=())[0] == 421
    for hosts in (("localhost", "attacker.example"), ("localhost", "localhost")):
        assert ask(guard(), headers=[("host", host) for host in hosts])[0] == 421
    assert ask(guard(), "/health", headers=())[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "https://127.0.0.1:8000"}, 200),  # behind a proxy
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "http://127.0.0.1"}, 403),
        ({"origin": "http://attacker.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "file://127.0.0.1:8000"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate",
          "sec-fetch-dest": "document"}, 403),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["GET", "POST", "websocket"])
def test_pages_of_other_sites_are_refused(headers, status, kind):
    scope = {"type": "websocket"} if kind == "websocket" else {"method": kind}
    answer = ask(guard(), headers={**LOCAL, **headers}, **scope)[0]
    assert answer == (1008 if kind == "websocket" and status != 200 else status)


def test_a_link_elsewhere_may_open_the_page_alone():
    link = {**LOCAL, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert ask(guard(), "/", headers={**link, "sec-fetch-dest": "document"})[0] == 200
    assert ask(guard(), "/", headers={**link, "sec-fetch-dest": "iframe"})[0] == 403
    assert ask(guard(), "/v1/live", headers={**link, "sec-fetch-dest": "document"})[0] == 403


def test_a_token_opens_the_server():
    guarded = guard(TOKEN)
    for headers in (
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Basic {TOKEN}"},
        {"cookie": f"packforcing-8000={TOKEN}"},
        {"cookie": "packforcing-8000="},
    ):
        status, answer, body = ask(guarded, headers={**LOCAL, **headers})
        assert status == 401 and answer["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["type"] == "authentication_error"
        assert TOKEN not in body.decode()
    assert ask(guarded, headers={**LOCAL, "authorization": f"bearer {TOKEN}"})[0] == 200
    assert ask(guarded, "/health")[0] == 200
    assert ask(guarded, type="websocket")[0] == 1008
    assert ask(guarded, f"/v1/videos?token={TOKEN.replace(' ', '+')}")[0] == 401


def test_the_printed_url_gives_the_page_a_cookie():
    guarded = guard(TOKEN)
    status, answer, _ = ask(guarded, f"/?token={TOKEN.replace(' ', '+')}")
    assert (status, answer["location"]) == (303, "/")
    cookie, *attributes = answer["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(attributes) and TOKEN not in cookie
    assert ask(guarded, "/", headers={**LOCAL, "cookie": f"other=1; {cookie}"})[0] == 200
    assert ask(guarded, "/?token=guess")[0] == 401
    assert ask(guarded, f"/?token={TOKEN.replace(' ', '+')}", method="POST")[0] == 401


def test_a_body_has_a_bound_whatever_it_says_about_its_length():
    guarded = guard(body_bytes=10)
    assert ask(guarded, method="POST", body=[b"12345", b"67890"])[0] == 200
    for headers in ({"content-length": "11"}, {"content-length": "9" * 5000},
                    {"content-length": "-1"}):  # fmt: skip
        assert ask(guarded, headers={**LOCAL, **headers}, method="POST")[0] == 413
    with pytest.raises(HTTPException) as error:  # which the application answers
        ask(guarded, method="POST", body=[b"12345", b"678901"])
    assert error.value.status_code == 413


def test_a_client_that_asks_too_often_waits():
    now = [0.0]
    guarded = Guard(
        application, Access(), Limits(requests_per_second=2, burst=3), now=lambda: now[0]
    )
    assert [ask(guarded)[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask(guarded)[1]["retry-after"] == "1"
    assert ask(guarded, client=("127.0.0.2", 5))[0] == 200  # another one does not wait
    networks = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8::4", "2001:db8:0:1::1"]
    assert [ask(guarded, client=(address, 5))[0] for address in networks] == [200] * 3 + [429, 200]
    now[0] = 1.0
    assert [ask(guarded)[0] for _ in range(3)] == [200, 200, 429]


def test_every_answer_keeps_the_page_to_itself():
    for path, inline in (("/", False), ("/v1/videos", False), ("/docs", True)):
        _, headers, _ = ask(guard(), path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert ("'unsafe-inline'" in policy) == inline
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer"
