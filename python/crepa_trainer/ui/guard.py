"""Who may talk to the page, and which folders it may open."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

TOKEN = "token"
_COOKIE = "crepa_token"
_POLICY_VIOLATION = 1008


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Folders:
    """The folders that the page was started with: `runs`, and `others` that it may read."""

    runs: Path
    others: Sequence[Path] = ()

    def inside(self, path: str | Path) -> Path:
        """`path` with its links followed; relative ones as settings have them, from the working directory on.

        ValueError, which names it and the folders, where it is in none of them.
        """
        try:
            found = Path(path).expanduser().resolve()
        except (OSError, RuntimeError) as error:  # too long; a ring of links; a ~ of nobody
            raise ValueError(f"{path}: {error}") from error
        roots = [root.resolve() for root in (self.runs, *self.others)]
        if not any(found.is_relative_to(root) for root in roots):
            where = ", ".join(map(str, roots))
            raise ValueError(f"{path}: outside the folders that this page was started with ({where}): see --folder")
        return found

    def inside_runs(self, path: str | Path) -> Path:
        """As `inside`, of `runs` alone, where the page writes."""
        return Folders(self.runs).inside(path)


class Guard:
    """ASGI middleware: answers only who asked for this server by its own name, from its own pages, with the token.

    A name that is another site's and was made to point here (DNS rebinding) is in `Host`; another site's page that
    calls this server says so in `Origin`, for websockets too.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None) -> None:
        self.app, self.host, self.token = app, host, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        refused = self._refusal(connection.headers)
        if refused is None and self.token is not None:
            given = connection.query_params.get(TOKEN)
            if scope["type"] == "http" and given is not None and _equal(given, self.token):
                await self._with_cookie(connection)(scope, receive, send)
                return
            if not _equal(connection.cookies.get(_COOKIE, ""), self.token):
                refused = "the page's address needs its token: use the one that crepa-train ui printed"
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(_POLICY_VIOLATION, refused)(scope, receive, send)
        else:
            await PlainTextResponse(refused, 403)(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return "Host is not this server's name"
        # A browser's own word; other programs send none.
        if any(urlsplit(origin).netloc.lower() != hosts[0].lower() for origin in origins):
            return "Origin is another site"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if is_loopback(self.host):
            return is_loopback(name)
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {"localhost", self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return True  # an address is nobody else's name

    def _with_cookie(self, connection: HTTPConnection) -> RedirectResponse:
        rest = [(key, value) for key, value in parse_qsl(connection.url.query) if key != TOKEN]
        # Never to another host, which a path that begins with // would be.
        path = "/" + connection.url.path.lstrip("/\\")
        answer = RedirectResponse(f"{path}?{urlencode(rest)}" if rest else path, 303)
        assert self.token is not None
        answer.set_cookie(_COOKIE, self.token, httponly=True, samesite="strict")
        return answer


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
