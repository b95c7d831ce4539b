"""The page's server: one process, no state but the files in its folders."""

from __future__ import annotations

import mimetypes
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, Response
from nicegui import ui
from rich.console import Console

from ..terminal import say
from .clips import checked_video, thumbnail
from .guard import TOKEN, Folders, Guard, is_loopback
from .pages import PAGES
from .shell import add_pages

_SHOWN = {".mp4", ".png", ".jpg", ".html"}
# A report draws its curves by its own script, and may neither call out nor act as this page.
_FILE_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; media-src data:; font-src data:"
)


def make_app(folders: Folders, host: str, token: str | None) -> FastAPI:
    """The page over these folders. token: what visitors must show, None where only this machine reaches it."""
    app = FastAPI(openapi_url=None)

    @app.get("/files/{path:path}")
    def file(path: str) -> FileResponse:
        try:
            found = folders.inside_runs(folders.runs / path)
            shown = found.suffix in _SHOWN and found.is_file()
        except (ValueError, OSError):  # outside; too long a name
            shown = False
        if not shown:
            raise HTTPException(404)
        kind = mimetypes.guess_type(found.name)[0]
        headers = {
            "Content-Security-Policy": _FILE_POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return FileResponse(found, media_type=kind, headers=headers)

    @app.get("/thumbnail")
    def first_frame(path: str) -> Response:
        try:
            video = checked_video(folders, path)
            picture = thumbnail(video, video.stat().st_mtime)
        except (ValueError, OSError):  # outside; no video; one that cannot be decoded
            raise HTTPException(404) from None
        return Response(picture, media_type="image/png", headers={"Cache-Control": "no-cache"})

    add_pages(PAGES, folders)
    ui.run_with(app, title="crepa-train", favicon="🎞️", show_welcome_message=False, reconnect_timeout=30)
    app.add_middleware(Guard, host=host, token=token)
    return app


def serve(runs: Path, others: Sequence[Path], host: str, port: int, token: str | None, console: Console) -> None:
    """Serves the page until a signal. ValueError where a folder is none, or the address cannot be had."""
    for folder in others:
        if not folder.is_dir():
            raise ValueError(f"--folder {folder}: not a folder")
    if runs.exists() and not runs.is_dir():
        raise ValueError(f"--runs {runs}: not a folder")
    runs.mkdir(parents=True, exist_ok=True)
    open_to_others = not is_loopback(host)
    if open_to_others and not token:
        token = secrets.token_urlsafe(32)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from error
    with listener:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        if open_to_others:
            say(console, f"{host} is reached by other machines: only who has the token is answered, unencrypted")
        say(console, f"open {address}?{TOKEN}={token}" if token else f"open {address}")
        app = make_app(Folders(runs.resolve(), tuple(each.resolve() for each in others)), host, token)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])
