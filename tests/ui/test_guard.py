"""Attacks on the page: other sites, other machines, paths out of its folders. Against the real server."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect
from web_pages import Server, page_server

SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"


def ask(address: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One GET with the path as it is, which a browser would tidy up."""
    place = urlsplit(address)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=20)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def ask_for_a_websocket(address: str, **headers: str) -> int:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
        given = {"Host": place.netloc, **upgrade, **headers}
        lines = [f"GET {SOCKET} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in given.items())]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.recv(100).split()[1])


def test_its_own_page_is_answered(server: Server) -> None:
    origin = server.address.rstrip("/")
    assert ask(server.address, "/")[0] == 200
    assert ask(server.address, "/", Origin=origin)[0] == 200
    assert ask_for_a_websocket(server.address, Origin=origin) == 101


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7865", "127.0.0.1.evil.example", "10.0.0.1", "", "[::"])
def test_a_name_that_was_made_to_point_here_is_refused(server: Server, host: str) -> None:
    assert ask(server.address, "/", Host=host)[0] in (400, 403)
    assert ask(server.address, "/_nicegui/", Host=host)[0] in (400, 403)
    assert ask_for_a_websocket(server.address, Host=host) in (400, 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1:1"])
def test_another_sites_page_is_refused(server: Server, origin: str) -> None:
    assert ask(server.address, "/", Origin=origin)[0] == 403
    assert ask_for_a_websocket(server.address, Origin=origin) == 403


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "..%2fsecret.png",
        "%2e%2e/secret.png",
        "..%5csecret.png",
        "a/../../secret.png",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "link/secret.png",
        "secret-link.png",
        "ring/x.png",
        "a%00.png",
        "x" * 5000 + ".png",
        "run/config.json",
        "run",
        "",
    ],
)
def test_a_file_outside_or_of_another_kind_is_not_there(server: Server, path: str) -> None:
    runs = server.runs
    secret = runs.parent / "secret.png"
    secret.write_bytes(b"secret")
    (runs / "run").mkdir(exist_ok=True)
    (runs / "run" / "config.json").write_text("{}")
    for link, target in (("link", runs.parent), ("secret-link.png", secret), ("ring", runs / "ring")):
        if not (runs / link).is_symlink():
            (runs / link).symlink_to(target)
    status, _, body = ask(server.address, f"/files/{path}")
    assert status in (307, 400, 404)
    assert b"secret" not in body


def test_a_report_cannot_act_as_the_page(server: Server, visit: Callable[..., Page]) -> None:
    (server.runs / "run").mkdir(exist_ok=True)
    (server.runs / "run" / "report.html").write_text(
        "<p id=x>before</p><script>document.getElementById('x').innerText = 'after ' + self.origin</script>"
    )
    page = visit(f"{server.address}files/run/report.html")
    expect(page.locator("#x")).to_have_text("after null")
    headers = ask(server.address, "/files/run/report.html")[1]
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]


def test_other_machines_need_the_token(tmp_path: Path, visit: Callable[..., Page]) -> None:
    with page_server(tmp_path, "--host", "0.0.0.0") as served:
        address, token = served.address.split("?token=")
        assert len(token) >= 32
        assert ask(address, "/")[0] == 403
        assert ask(address, "/?token=wrong")[0] == 403
        assert ask(address, f"/?token={token}x")[0] == 403
        assert ask(address, "/?token=%C3%A9")[0] == 403
        assert ask(address, "/files/a.png", Cookie="crepa_token=wrong")[0] == 403
        assert ask_for_a_websocket(address) == 403
        assert ask_for_a_websocket(address, Cookie="crepa_token=wrong") == 403
        assert ask(address, f"/?token={token}", Host="evil.example")[0] == 403
        assert ask(address, f"/?token={token}", Origin="http://evil.example")[0] == 403

        status, headers, _ = ask(address, f"//evil.example/..?token={token}&file=a")
        assert status == 303
        assert headers["location"].startswith("/evil.example")  # a path of this server
        assert "httponly" in headers["set-cookie"].lower()
        assert "samesite=strict" in headers["set-cookie"].lower()
        cookie = headers["set-cookie"].split(";")[0]
        assert ask(address, "/", Cookie=cookie)[0] == 200
        assert ask_for_a_websocket(address, Cookie=cookie) == 101

        page = visit(served.address.replace("0.0.0.0", "127.0.0.1"))
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert "token" not in page.url
        page.context.close()


def test_a_token_of_ones_own_is_asked_for_on_this_machine_too(tmp_path: Path) -> None:
    with page_server(tmp_path, "--token", "open sesame") as served:
        address = served.address.split("?")[0]
        assert ask(address, "/")[0] == 403
        assert ask(address, "/?token=open%20sesame")[0] == 303


def test_settings_reach_no_shell(server: Server, visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit(f"{server.address}new")
    trap = tmp_path / "trap"
    wanted = f"$(touch {trap}) `touch {trap}`; touch {trap} #'\""
    page.get_by_label("Settings file (JSON)").fill(json.dumps({"data": wanted, "model": wanted}))
    shown_command = page.get_by_label("Command line")
    expect(shown_command).to_have_value(re.compile("touch"))
    command = shown_command.input_value()
    # What it shows for copying is one word of a shell.
    shown = command.replace("crepa-train run", f"{sys.executable} -c 'import sys; print(sys.argv[1:])'")
    printed = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout
    assert repr(f"--data={wanted}") in printed
    assert not trap.exists()


def test_a_port_that_is_taken_is_one_line(server: Server, tmp_path: Path) -> None:
    port = str(urlsplit(server.address).port)
    command = [sys.executable, "-m", "crepa_trainer", "ui", "--runs", str(tmp_path), "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"--port {port}: Address already in use" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
