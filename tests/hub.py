"""A hub on this machine: as much of the Hugging Face hub's HTTP as huggingface_hub needs to download a repository."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.commands.serving import bind

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refuse(status: int, code: str) -> Response:
    return JSONResponse({"error": code}, status, headers={"X-Error-Code": code, "X-Error-Message": code})


class Hub:
    """Repositories are folders, `root/owner/name/…`; `owner/gated` is gated; only `main` and one commit exist."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        methods = ["GET", "HEAD"]
        self.app = Starlette(
            routes=[
                Route("/api/models/{owner}/{name}", self.info),
                Route("/api/models/{owner}/{name}/revision/{revision}", self.info),
                Route("/api/models/{owner}/{name}/tree/{revision}", self.tree),
                Route("/{owner}/{name}/resolve/{revision}/{file:path}", self.file, methods=methods),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        self.asked.append(request.url.path)
        repo = f"{request.path_params['owner']}/{request.path_params['name']}"
        if repo == "owner/gated":
            return refuse(403, "GatedRepo")
        if not (self.root / repo).is_dir():
            return refuse(401, "RepoNotFound")
        if request.path_params.get("revision", "main") not in ("main", COMMIT):
            return refuse(404, "RevisionNotFound")
        return None

    def _files(self, request: Request) -> list[Path]:
        folder = self.root / request.path_params["owner"] / request.path_params["name"]
        return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]

    async def info(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        repo = f"{request.path_params['owner']}/{request.path_params['name']}"
        siblings = [{"rfilename": str(path)} for path in self._files(request)]
        return JSONResponse({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False})

    async def tree(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        return JSONResponse(
            [{"type": "file", "path": str(path), "size": 1, "oid": "0"} for path in self._files(request)]
        )

    async def file(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        folder = self.root / request.path_params["owner"] / request.path_params["name"]
        path = folder / request.path_params["file"]
        if not path.is_file():
            return refuse(404, "EntryNotFound")
        body = path.read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        return Response(body, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})


@contextmanager
def running_hub(root: Path) -> Iterator[tuple[str, Hub]]:
    listener = bind("127.0.0.1", 0)
    hub = Hub(root)
    server = uvicorn.Server(uvicorn.Config(hub.app, log_config=None, access_log=False))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", hub
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
