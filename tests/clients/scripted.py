"""A proxy in front of a real server that answers the first requests itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

SILENT, BROKEN, ENDLESS, LOST, LATE = "silent", "broken", "endless", "lost", "late"
"""In place of a status: no answer, an answer that ends early, one that never ends, the loss of the server's answer, and
the server's answer after `released` is set."""


class Proxy:
    """script: what becomes of the next POSTs, each a status, with Retry-After or None, or one of the words above.

    polls, results: the same of the next GETs for the progress and for the answer of a job.
    limit_s: the server must answer within it, else the proxy answers 504. hidden: headers that are not passed on.
    jobs: the addresses of the jobs that the server accepted.
    """

    def __init__(self, target: str) -> None:
        self.target, self.script, self.posts = target.rstrip("/"), [], []
        self.script: list[tuple[int, str | None] | str]
        self.posts: list[dict[str, str]]  # the headers of each
        self.polls: list[tuple[int, str | None] | str] = []
        self.results: list[tuple[int, str | None] | str] = []
        self.ended, self.released = threading.Event(), threading.Event()
        self.limit_s, self.hidden, self.jobs = 300.0, {"Host", "Content-Length"}, []
        self.hidden: set[str]
        self.jobs: list[str]

    def handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                script = proxy.results if self.path.endswith("/result") else proxy.polls
                if "/jobs/" in self.path and script:
                    proxy.perform(self, script.pop(0), None)
                else:
                    proxy.forward(self, None)

            def do_DELETE(self) -> None:
                proxy.forward(self, None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                proxy.posts.append(dict(self.headers))
                if proxy.script:
                    proxy.perform(self, proxy.script.pop(0), body)
                else:
                    proxy.forward(self, body)

        return Handler

    def forward(self, handler: BaseHTTPRequestHandler, body: bytes | None) -> None:
        try:
            answer = self.ask(handler, body)
        except requests.Timeout:
            self.perform(handler, (504, None), body)
            return
        self.answer(handler, answer)

    def answer(self, handler: BaseHTTPRequestHandler, answer: requests.Response) -> None:
        handler.send_response(answer.status_code)
        for key in ("shape", "dtype", "Content-Type", "Retry-After", "Location"):
            if key in answer.headers:
                handler.send_header(key, answer.headers[key])
        handler.send_header("Content-Length", str(len(answer.content)))
        handler.end_headers()
        handler.wfile.write(answer.content)

    def ask(self, handler: BaseHTTPRequestHandler, body: bytes | None) -> requests.Response:
        headers = {key: value for key, value in handler.headers.items() if key not in self.hidden}
        url = self.target + handler.path
        answer = requests.request(handler.command, url, data=body, headers=headers, timeout=(300, self.limit_s))
        if "Location" in answer.headers:
            self.jobs.append(self.target + answer.headers["Location"])
        return answer

    def perform(self, handler: BaseHTTPRequestHandler, act: tuple[int, str | None] | str, body: bytes | None) -> None:
        handler.close_connection = True
        if act == LOST:
            self.ask(handler, body)
            return
        if act == LATE:
            answer = self.ask(handler, body)
            self.released.wait()
            self.answer(handler, answer)
            return
        if act == SILENT:
            self.ended.wait()
            return
        if isinstance(act, tuple):
            status, retry_after = act
            handler.send_response(status)
            if retry_after is not None:
                handler.send_header("Retry-After", retry_after)
            body = json.dumps({"error": f"the sentence of {status}", "code": "some_code", "request_id": "1"}).encode()
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**9))
        handler.end_headers()
        while act == ENDLESS and not self.ended.wait(0.02):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return


@contextmanager
def scripted(target: str) -> Iterator[tuple[Proxy, str]]:
    """The proxy and its address."""
    proxy = Proxy(target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), proxy.handler())
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield proxy, f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        proxy.ended.set()
        proxy.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
