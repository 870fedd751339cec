"""The connection to a VAE decode server: which server, which models it has, and requests that can be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import aiohttp
import torch

T = TypeVar("T")
Params = Sequence[tuple[str, Any]]
Show = Callable[[float], None]
"""Called about ten times a second with the share of the work that is done. It may raise, which cancels the work."""

DEFAULT_ADDRESS = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 600.0
CONNECT_S = 10.0
RETRIES = 2  # after a server could not be reached; a busy one is asked until the timeout
LOOK_S = 0.1  # how often the cancel button is looked at
ASK_PROGRESS_S = 0.5
CLOSE_S = 0.25  # in which closed connections close their sockets, after the result was handed over
CHUNK_BYTES = 1 << 18
COMPUTED = 0.9  # the share of a request that is done when its answer begins to arrive
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "uint8")}


class RemoteError(RuntimeError):
    """A request that failed. Its text has the sentence of the server.

    status: the HTTP status; None if no server answered. code: the stable word of the server for the error.
    """

    def __init__(self, sentence: str, status: int | None = None, code: str | None = None) -> None:
        """Make the error."""
        super().__init__(sentence)
        self.status = status
        self.code = code


class TryAgain(Exception):
    """An attempt that may succeed later.

    wait_s: how long to wait before the next attempt. is_busy: the server answered that it is busy.
    """

    def __init__(self, error: RemoteError, wait_s: float, *, is_busy: bool = False) -> None:
        """Make the note."""
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s
        self.is_busy = is_busy


@dataclass(frozen=True)
class Server:
    """One server.

    base: its address, without the name of a model. model: the name in the address; None if there is none.
    query: the parameters in the address, which every request gets. timeout_s: for a request with all its attempts.
    """

    base: str
    key: str | None = None
    model: str | None = None
    query: tuple[tuple[str, str], ...] = ()
    timeout_s: float = DEFAULT_TIMEOUT_S

    def route(self, *segments: str) -> str:
        """Return the address of a route."""
        return "/".join([self.base, *segments])

    @property
    def headers(self) -> dict[str, str]:
        """The header with the key."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


def read_settings(file: Path) -> dict[str, Any]:
    """Return the settings of a file: `url`, `key` and `timeout_s`. Raises RemoteError if it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RemoteError(f"{file} cannot be read as JSON ({error}); correct or delete it") from error
    if not isinstance(found, dict):
        raise RemoteError(f'{file} must be an object such as {{"url": "{DEFAULT_ADDRESS}", "key": "…"}}')
    return found


def find_server(
    address: str, key: str, file: Path, environment: Mapping[str, str] = os.environ, model: str | None = None
) -> Server:
    """Return the server to use. Raises RemoteError for an address that is none.

    address, key: of a node, or empty. Then VAE_SERVER_URL and VAE_SERVER_KEY are used, and then `url` and `key` of the
        file.
    model: the name of a model, in place of the name in the address.

    A key that is configured is sent only to the server that is configured: an address in somebody else's workflow
    does not get it.
    """
    stored = read_settings(file)
    configured = environment.get("VAE_SERVER_URL") or stored.get("url") or DEFAULT_ADDRESS
    own_key = environment.get("VAE_SERVER_KEY") or stored.get("key") or None
    used, home = read_address(address.strip() or configured), read_address(configured)
    inherited = used.key or (own_key if _origin(used.base) == _origin(home.base) else None)
    timeout_s = stored.get("timeout_s", DEFAULT_TIMEOUT_S)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or timeout_s <= 0:
        raise RemoteError(f"timeout_s in {file} must be a number of seconds, not {timeout_s!r}")
    return Server(used.base, key.strip() or inherited, model or used.model, used.query, float(timeout_s))


def read_address(address: str) -> Server:
    """Read an address such as `http://host:8000/flux`, whose last segment is the name of the model.

    Raises RemoteError.
    """
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, port = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RemoteError(f"{address!r} is not the address of a server; give one such as {DEFAULT_ADDRESS}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path, _, model = parts.path.rstrip("/").rpartition("/")
    base = urlunsplit((parts.scheme, host + port, path, "", ""))
    key = unquote(parts.password) if parts.password else None
    return Server(base, key, model or None, tuple(parse_qsl(parts.query)))


def _origin(base: str) -> tuple[str, str | None, int]:
    parts = urlsplit(base)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


@dataclass(frozen=True)
class Request:
    """One POST request.

    route: the parts of the path after the server's address. params: the query. body: the tensor to send.
    """

    route: Sequence[str]
    params: Params
    body: torch.Tensor
    accept: str = "tensor/binary"


@dataclass(frozen=True)
class Answer:
    """A complete answer with status 200."""

    body: bytearray
    headers: Mapping[str, str]

    def tensor(self) -> torch.Tensor:
        """Return the tensor, on the CPU. Raises RemoteError if the answer is none."""
        try:
            shape, dtype = json.loads(self.headers["shape"]), DTYPES[self.headers["dtype"]]
            return torch.frombuffer(self.body, dtype=dtype).reshape(shape)
        except (KeyError, ValueError, RuntimeError) as error:
            raise RemoteError("the server sent something other than a tensor; check its address") from error


class Connection:
    """Requests to one server within one time limit.

    show: gets the share of all requests that is done, and may raise to cancel. count: how many requests there will be.
    """

    def __init__(self, server: Server, show: Show, count: int = 1) -> None:
        """Start the time limit."""
        self.server = server
        self.count = count
        self._show = show
        self._deadline = time.monotonic() + server.timeout_s
        self._done = 0
        self._share = 0.0

    def models(self) -> dict[str, Any]:
        """Return what `GET /models` answers. Raises RemoteError."""
        return self._run(lambda session: self._again(lambda: self._list(session)))

    def post(self, request: Request) -> Answer:
        """Send one request and return its answer. Raises RemoteError, and whatever `show` raises."""
        answer = self._run(lambda session: self._again(lambda: self._exchange(session, request)))
        self._done += 1
        self._share = 0.0
        self._show(self._done / self.count)
        return answer

    def _run(self, work: Callable[[aiohttp.ClientSession], Awaitable[T]]) -> T:
        """Run the work in an event loop of its own thread, and look at the cancel button in this one.

        ComfyUI calls a VAE in a thread that already runs an event loop.
        """
        outcome: Future[T] = Future()
        loop = asyncio.new_event_loop()

        async def main() -> T:
            limit = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            # Redirects are refused below: a POST would become a GET.
            async with aiohttp.ClientSession(timeout=limit, headers=self.server.headers) as session:
                async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                    return await work(session)

        task = loop.create_task(main())

        def thread() -> None:
            try:
                outcome.set_result(loop.run_until_complete(task))
            except BaseException as error:  # noqa: BLE001  # it is raised again in the thread that waits
                outcome.set_exception(error)
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(asyncio.sleep(CLOSE_S))
                loop.close()

        worker = threading.Thread(target=thread, daemon=True)
        worker.start()
        try:
            while not outcome.done():
                with contextlib.suppress(TimeoutError):
                    outcome.exception(LOOK_S)
                self._show((self._done + self._share) / self.count)
        except BaseException:  # also ComfyUI's own, when the user cancels
            with contextlib.suppress(RuntimeError):  # the loop has just ended by itself
                loop.call_soon_threadsafe(task.cancel)
            worker.join(CONNECT_S)  # the connection is closed, so that the server stops too
            raise
        try:
            return outcome.result()
        except TimeoutError:
            sentence = f"{self.server.base} did not answer within {self.server.timeout_s:g} s."
            raise RemoteError(sentence, code="timeout") from None

    async def _again(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an attempt while it may succeed later and there is time."""
        failures = 0
        while True:
            try:
                return await attempt()
            except TryAgain as note:
                failures += not note.is_busy
                if failures > RETRIES or time.monotonic() + note.wait_s >= self._deadline:
                    raise note.error from None
                await asyncio.sleep(note.wait_s)

    async def _list(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        body = (await self._receive(session.get(self.server.route("models"), allow_redirects=False))).body
        try:
            listed = json.loads(body)
            if all("name" in model for model in listed["models"]) and listed["default"]:
                return dict(listed)
        except (ValueError, KeyError, TypeError):
            pass
        raise RemoteError(f"{self.server.base} is not a VAE decode server: its /models is not a list of models")

    async def _exchange(self, session: aiohttp.ClientSession, request: Request) -> Answer:
        name = uuid.uuid4().hex
        tensor = request.body
        headers = {
            "Content-Type": "tensor/binary",
            "Accept": request.accept,
            "X-Request-Id": name,
            "X-Request-Timeout": f"{max(0.001, self._deadline - time.monotonic()):.3f}",
        }
        about = [*(("shape", size) for size in tensor.shape), ("dtype", str(tensor.dtype).removeprefix("torch."))]
        query = [(key, str(value)) for key, value in [*self.server.query, *about, *request.params]]
        # numpy keeps the tensor alive, and the tensor its memory, until the body is sent.
        data = memoryview(tensor.view(torch.uint8).numpy()).cast("B")
        headers["Content-Length"] = str(len(data))
        watching = asyncio.create_task(self._watch(session, name))
        try:
            route = self.server.route(*request.route)
            return await self._receive(
                session.post(route, params=query, data=_chunks(data), headers=headers, allow_redirects=False)
            )
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, session: aiohttp.ClientSession, name: str) -> None:
        """Ask for the progress of a request until this is cancelled. Without an answer there is only no progress."""
        while True:
            await asyncio.sleep(ASK_PROGRESS_S)
            with contextlib.suppress(aiohttp.ClientError, ValueError, KeyError, TypeError):
                async with session.get(self.server.route("requests", name, "progress")) as response:
                    if response.ok:
                        self._share = max(self._share, COMPUTED * float((await response.json())["progress"]))

    async def _receive(self, sent: Any) -> Answer:
        """Read an answer. Raises TryAgain, RemoteError."""
        content = bytearray()
        try:
            async with sent as response:
                total = response.content_length
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    content += chunk
                    if total and response.ok:
                        self._share = max(self._share, COMPUTED + (1 - COMPUTED) * len(content) / total)
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, aiohttp.InvalidURL):
                raise RemoteError(f"{self.server.base} is not the address of a server") from error
            sentence = f"{self.server.base} cannot be reached or broke off ({type(error).__name__}: {error})."
            raise TryAgain(RemoteError(sentence, code="unreachable"), 1.0) from error
        if response.status == 200:
            return Answer(content, response.headers)
        raise self._refusal(response, content)

    def _refusal(self, response: aiohttp.ClientResponse, content: bytearray) -> Exception:
        """Return the error of an answer that is none, or TryAgain if another attempt may succeed."""
        status = response.status
        try:
            told = json.loads(content)
            sentence, code = str(told["error"]), told.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            sentence, code = content[:200].decode(errors="replace").strip() or str(response.reason), None
        error = RemoteError(f"{self.server.base} answered {status}: {sentence}", status, code)
        wait = response.headers.get("Retry-After", "")
        if status in (429, 503) and code != "model_unavailable" and wait.isdecimal():
            return TryAgain(error, float(wait), is_busy=True)
        if status in (408, 429, 502):
            return TryAgain(error, 1.0)
        return error


async def _chunks(data: memoryview) -> AsyncIterator[memoryview]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


class Menu:
    """The names of the server's models for ComfyUI's menus.

    ComfyUI asks for them while it starts and whenever a page is loaded. A server that does not answer at once must not
    stop it, so they are fetched in a thread, and an answer that comes later is used the next time.
    """

    WAIT_S = 1.0
    FRESH_S = 10.0

    def __init__(self, server: Callable[[], Server]) -> None:
        """Make the menu. server: returns the server, or raises RemoteError."""
        self._server = server
        self._known: list[dict[str, Any]] | None = None
        self._asked = float("-inf")
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def models(self) -> list[dict[str, Any]] | None:
        """Return the entries of `GET /models`, or None if the server cannot be reached."""
        with self._lock:
            is_asking = self._thread is not None and self._thread.is_alive()
            if not is_asking and time.monotonic() - self._asked > self.FRESH_S:
                self._asked = time.monotonic()
                self._thread = threading.Thread(target=self._fetch, daemon=True)
                self._thread.start()
                is_asking = True
            thread = self._thread
        if is_asking and thread is not None:
            thread.join(self.WAIT_S)
        return self._known

    def _fetch(self) -> None:
        try:
            server = self._server()
            brief = Server(server.base, server.key, timeout_s=self.FRESH_S)
            self._known = Connection(brief, lambda _: None).models()["models"]
        except RemoteError:
            self._known = None
