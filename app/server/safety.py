"""What a server refuses before any route sees it.

A browser lets every page on the web send requests to servers on this machine. Two checks keep such
pages out: the Host that a request names has to be this server's (a page whose own name was made to
lead here, by DNS rebinding, is thereby refused), and where a browser says from which page a request
comes (Origin, Sec-Fetch-Site), that has to be this server's own. Beyond this machine a token is
needed as well. Sizes and rates are bounded for everybody.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packforcing.app.server.errors import ApiError

MIN_TOKEN = 16  # characters
OPEN_PATH = "/health"  # needs no token and no Host
_STREAMS = ("/v1/live/stream", "/v1/live/video")
_CLIENTS = 10_000  # whose rates are known; of more, the ones that were silent longest are forgotten

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# the pages of the API's documentation, which show nothing that users wrote, have inline scripts
_DOCS_POLICY = _PAGE_POLICY.replace("-src 'self';", "-src 'self' 'unsafe-inline';")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Limits:
    """What clients may ask for at most.

    Attributes:
        body_bytes: Of a request; what a start takes.
        body_seconds: That a request may take to arrive.
        form_parts: Fields of a form, its file included.
        text_characters: Of a prompt.
        switches: Of a schedule.
        start_pixels: Of all frames of a start that are decoded to reach its end; those of a minute
            at 1920x1080.
        queued_jobs: Jobs that wait or are being rendered.
        requests_per_second: Of a client, on average.
        burst: Requests of a client at once.
        viewers: Streams of the live video.
    """

    body_bytes: int = 64 << 20
    body_seconds: float = 120.0
    form_parts: int = 20
    text_characters: int = 10_000
    switches: int = 1_000
    start_pixels: int = 4_000_000_000
    queued_jobs: int = 2_000
    requests_per_second: float = 50.0
    burst: int = 200
    viewers: int = 200


@dataclass(frozen=True)
class Access:
    """Who may use a server.

    Attributes:
        hosts: Names that a request's Host may have, in lower case, beside IP addresses and
            "localhost".
        token: That a request has to have; None: none is needed.
    """

    hosts: frozenset[str] = frozenset()
    token: str | None = None

    @property
    def cookie(self) -> str:
        """What the cookie of the page holds in place of the token."""
        return hmac.digest((self.token or "").encode(), b"packforcing page", "sha256").hex()


def own_hosts(host: str, others: Iterable[str] = ()) -> frozenset[str]:
    """Return the names of a server that listens on `host`: this one, the machine's and others."""
    name = socket.gethostname()
    return frozenset(other.lower().rstrip(".") for other in (host, name, f"{name}.local", *others))


class Guard:
    """ASGI middleware that refuses what the module describes, and adds headers to answers."""

    def __init__(
        self,
        application: ASGIApp,
        access: Access,
        limits: Limits,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Guard an application.

        Args:
            application: Sees what is let through.
            access: Who is let through.
            limits: How much of it.
            now: Returns seconds.
        """
        self._application, self._access, self._limits, self._now = application, access, limits, now
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, when
        self._viewers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        answer = _with_headers(send, path)
        try:
            self._check_rate(scope)
            if path != OPEN_PATH:
                self._check_host(headers)
                _check_origin(scope, headers)
                if self._access.token is not None and not self._is_known(scope, headers):
                    if not self._has_token_in_query(scope):
                        raise ApiError(
                            "this server needs a token: open the URL that 'packforcing serve' "
                            "printed, or send 'Authorization: Bearer TOKEN'",
                            401,
                        )
                    page = RedirectResponse("/", 303)
                    page.set_cookie(
                        _cookie_name(scope), self._access.cookie, httponly=True, samesite="strict"
                    )
                    await page(scope, receive, answer)
                    return
            if path in _STREAMS and self._viewers >= self._limits.viewers:
                raise ApiError("the live video has as many viewers as it may have", 503)
            bounded = self._bound(headers, receive) if scope["type"] == "http" else receive
        except ApiError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": ""})
            else:
                response = error.response()
                if error.status == 401:
                    response.headers["www-authenticate"] = "Bearer"
                elif error.status == 429:
                    response.headers["retry-after"] = "1"
                await response(scope, receive, answer)
            return
        self._viewers += path in _STREAMS
        try:
            await self._application(scope, bounded, answer)
        finally:
            self._viewers -= path in _STREAMS

    def _check_rate(self, scope: Scope) -> None:
        """Let a client make `burst` requests at once and `requests_per_second` on average."""
        limits, now = self._limits, self._now()
        client = _client(scope)
        left, then = self._clients.pop(client, (float(limits.burst), now))
        left = min(limits.burst, left + (now - then) * limits.requests_per_second)
        self._clients[client] = max(0.0, left - 1), now
        if len(self._clients) > _CLIENTS:
            self._clients.popitem(last=False)
        if left < 1:
            raise ApiError("too many requests: wait a second", 429, code="rate_limit_exceeded")

    def _check_host(self, headers: Headers) -> None:
        name = _host_name(headers)
        if name != "localhost" and not _is_address(name) and name not in self._access.hosts:
            raise ApiError(
                "this server does not go by the name in the request's Host; if it should, start it "
                "with --allow-host NAME",
                421,
            )

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        """Tell whether a request has the token, or the page's cookie."""
        assert self._access.token is not None
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(token.strip(), self._access.token):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(_cookie_name(scope))
        except CookieError:
            return False
        return cookie is not None and _equal(cookie.value, self._access.cookie)

    def _has_token_in_query(self, scope: Scope) -> bool:
        """Tell whether a request is the one that a person opens the page with."""
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("GET", "/"):
            return False
        tokens = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=10)
        return _equal("".join(tokens.get("token", [])), self._access.token or "")

    def _bound(self, headers: Headers, receive: Receive) -> Receive:
        """Refuse a body that is too large, at once where its length is stated."""
        limits = self._limits
        too_large = f"a request has at most {limits.body_bytes >> 20} MiB"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > limits.body_bytes:
            raise ApiError(too_large, 413)
        size, ends, complete = 0, self._now() + limits.body_seconds, False

        async def receive_bounded() -> Message:
            nonlocal size, complete
            if complete:  # what comes now is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, ends - self._now())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request did not arrive in time") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > limits.body_bytes:
                raise HTTPException(413, too_large)
            return message

        return receive_bounded


def _with_headers(send: Send, path: str) -> Send:
    policy = _DOCS_POLICY if path == "/docs" else _PAGE_POLICY

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in {**_HEADERS, "content-security-policy": policy}.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers


def _client(scope: Scope) -> str:
    """Return whose rate a request counts for: an address, of IPv6 a network of one user."""
    address = scope["client"][0] if scope.get("client") else ""
    if ":" in address:
        return str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False))
    return address


def _host_name(headers: Headers) -> str:
    """Return the name in a request's Host, in lower case and without the port; "" for none."""
    hosts = headers.getlist("host")
    if len(hosts) != 1:
        return ""
    host = hosts[0].strip().lower()
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host, "0"
    if not port.isdecimal():
        return ""
    return name.removesuffix(".")


def _is_address(name: str) -> bool:
    """Tell whether a Host's name is an IP address: no page of another name can pretend to be it."""
    bracketed = name.startswith("[") and name.endswith("]")
    try:
        address = ipaddress.ip_address(name[1:-1] if bracketed else name)
    except ValueError:
        return False
    return bracketed == (address.version == 6)


def _check_origin(scope: Scope, headers: Headers) -> None:
    """Refuse what a browser sends for a page of another site."""
    message = "pages of other sites may not use this server"
    own = headers.get("host", "").strip().lower()
    for origin in headers.getlist("origin"):
        scheme, _, place = origin.strip().lower().partition("://")
        if scheme not in ("http", "https") or place != own:
            raise ApiError(message, 403)
    if "cross-site" in headers.getlist("sec-fetch-site"):
        opens_page = (
            scope["type"] == "http"
            and (scope["method"], scope["path"]) == ("GET", "/")
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )
        if not opens_page:
            raise ApiError(message, 403)


def _cookie_name(scope: Scope) -> str:
    """Name the cookie after the port: cookies of one machine's servers are shared."""
    server = scope.get("server")
    return f"packforcing-{server[1] if server else 0}"


def _equal(value: str, secret: str) -> bool:
    """Compare in a time that does not tell how much is right."""
    return bool(secret) and hmac.compare_digest(value.encode(), secret.encode())
