"""Use a VAE decode server in the place of the VAE of a diffusers pipeline.

    pipe.vae = RemoteVAE("http://host:8000/flux", key="…")

The pipeline stays unmodified: it unscales the latents by `vae.config`, which comes from the server, and calls
`vae.decode` and `vae.encode`, which send the tensors to the server. The weights of the VAE are never loaded here.

This file needs torch and requests. `RemoteDecodeStep` and `RemoteEncodeStep` need diffusers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import requests
import torch

__all__ = ["FoundServer", "RemoteDecodeStep", "RemoteEncodeStep", "RemoteVAE", "RemoteVAEError", "Timeout"]

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "uint8")}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHUNK_BYTES = 1 << 18
POLL_S = (0.1, 2.0)  # the shortest and the longest pause between two questions for the progress of a job
CANCEL_S = 2.0  # how long the end of a job may take, and the answer that says which job it is
PASSING = (None, 408, 429, 502, 503, 504)  # statuses of a connection or a proxy that failed; the job goes on
SERVICE_TYPE = "_vae-server._tcp.local."
"""Under which servers advertise themselves on the local network."""
ACCEPT_S = 1.0  # how long a server on the local network may take to accept a connection
HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

# Classes whose statistics are in their weights. The server knows those only once it has loaded the model.
KEEP_STATISTICS = (
    "AutoencoderKLFlux2",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLLTX2Video",
    "LTX2VideoDiffusionDecoderModel",
)

Progress = Callable[[str, float, float | None], None]
"""Called with the stage, what is done, and the total or None.

`send` and `receive` count bytes, `wait` seconds; `compute` is the fraction of a job that is done, 0 to 1.
"""


class Timeout(NamedTuple):
    """Time limits in seconds.

    connect: to connect to one server. read: without any byte from the server.
    total: for a request with all attempts and waiting. The server stops at the same time.
    """

    connect: float = 10
    read: float = 300
    total: float = 600


class RemoteVAEError(RuntimeError):
    """A request that failed. Its text has the sentence of the server.

    status: the HTTP status; None if no server answered. code: the stable word of the server for the error.
    latents: the latents of a failed decode, on the CPU, as they were given to `decode`.
    latents_file: the file with these latents; None if they were not saved.
    """

    def __init__(self, sentence: str, status: int | None = None, code: str | None = None) -> None:
        """Make the error."""
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.latents: torch.Tensor | None = None
        self.latents_file: Path | None = None

    @property
    def is_of_the_request(self) -> bool:
        """Whether the same request would fail anywhere: a wrong key, model, shape or value."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in (408, 429)

    def add(self, sentence: str) -> None:
        """Add a sentence to the text."""
        self.args = (f"{self.args[0]} {sentence}",)

    def __str__(self) -> str:
        """Return the sentence, and where the latents are."""
        saved = f" The latents are saved in {self.latents_file}." if self.latents_file else ""
        return f"{self.args[0]}{saved}"


class Decoded(NamedTuple):
    """What `decode` returns. sample: `[B, C, H, W]` or `[B, C, F, H, W]`, in [-1, 1]."""

    sample: torch.Tensor


class Encoded(NamedTuple):
    """What `encode` returns for a VAE with a posterior."""

    latent_dist: Posterior


class EncodedLatents(NamedTuple):
    """What `encode` returns for a VAE without a posterior."""

    latents: torch.Tensor

    @property
    def latent(self) -> torch.Tensor:
        """The same latents, under the name that AutoencoderDC has for them."""
        return self.latents


class Posterior:
    """The normal distribution of the latents of encoded pixels, as diffusers' `DiagonalGaussianDistribution`.

    parameters: `[B, 2 C, ...]`, the mean and the logarithm of the variance. `sample` gives the same as diffusers.
    """

    def __init__(self, parameters: torch.Tensor) -> None:
        """Make the distribution."""
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def mode(self) -> torch.Tensor:
        """Return the most likely latents, `[B, C, ...]`."""
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """Return latents that are drawn with the generator, or with one generator for each image."""
        shape, device, dtype = self.mean.shape, self.mean.device, self.mean.dtype
        if isinstance(generator, list) and len(generator) > 1:
            drawn = torch.cat([self._noise((1, *shape[1:]), each) for each in generator])
        else:
            drawn = self._noise(shape, generator[0] if isinstance(generator, list) else generator)
        return self.mean + self.std * drawn.to(device, dtype)

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None) -> torch.Tensor:
        device = self.mean.device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=self.mean.dtype)


class Certain:
    """The distribution of a VAE that has none: always the same latents."""

    def __init__(self, latents: torch.Tensor) -> None:
        """Make the distribution."""
        self.parameters = self.mean = latents

    def mode(self) -> torch.Tensor:
        """Return the latents."""
        return self.mean

    def sample(self, generator: Any = None) -> torch.Tensor:
        """Return the latents."""
        return self.mean


class Config(dict):
    """A VAE's config, which can be read as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        """Return an entry. Raises AttributeError if there is none."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config of this VAE has no {name!r}") from None


class Server(NamedTuple):
    """One address. base: without the model and a slash at the end. query: parameters that every request gets."""

    base: str
    model: str | None
    query: tuple[tuple[str, str], ...]

    @staticmethod
    def of(address: str, model: str | None) -> Server:
        """Read an address. Its last segment is the model, unless the model is given. Raises ValueError."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{address!r} is not the address of a server; give one such as http://host:8000/flux")
        path = parts.path.rstrip("/")
        if model is None and path:
            path, _, model = path.rpartition("/")
        return Server(urlunsplit((parts.scheme, parts.netloc, path, "", "")), model, tuple(parse_qsl(parts.query)))

    @property
    def label(self) -> str:
        """The address without a password."""
        parts = urlsplit(self.base)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, f"{parts.path}/{self.model or ''}", "", ""))

    def route(self, *segments: str) -> str:
        """Return the address of a route of the model."""
        return "/".join([self.base, *([self.model] if self.model else []), *segments]) + ("" if segments else "/")


class FoundServer(NamedTuple):
    """A server that advertises itself on the local network.

    address: for RemoteVAE, with the server's default model; append the name of another one. needs_key: whether it
    refuses requests without an API key. version: the server's version.
    """

    name: str
    address: str
    needs_key: bool
    version: str

    @staticmethod
    def all_of(info: Any) -> list[FoundServer]:
        """Return the server of a zeroconf.ServiceInfo at each address that it may have; an empty list if it has none.

        The name of the record is used, if it has one, and otherwise all its IP addresses, IPv4 first.
        """
        told = {(key or b"").decode(errors="replace"): (value or b"").decode(errors="replace")
                for key, value in info.properties.items()}  # fmt: skip
        name, scheme, path = info.name.removesuffix(f".{SERVICE_TYPE}"), "http", told.get("path", "/")
        if told.get("tls") == "1":
            scheme = "https"
        if not info.port or not path.startswith("/"):
            return []
        hosts = [told["host"]] if told.get("host") else sorted(info.parsed_addresses(), key=lambda each: ":" in each)
        addresses = [f"{scheme}://{_bracketed(host)}:{info.port}{path}" for host in hosts if _is_usable(host)]
        return [FoundServer(name, each, told.get("key") == "1", told.get("version", "")) for each in addresses]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_usable(host: str) -> bool:
    """Return whether an address can have this host: a name, or an IP address that does not need an interface's name."""
    address = _ip_address(host)
    if address is None:
        return HOST_NAME.fullmatch(host) is not None
    return "%" not in host and not (address.version == 6 and address.is_link_local)


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


async def _is_here(address: str) -> bool | None:
    """Return whether an address is one of this machine; None if nothing there accepts a connection.

    An address with a name is not tried, because the search for the name could take long.
    """
    parts = urlsplit(address)
    if _ip_address(parts.hostname or "") is None:
        return False
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, parts.port), ACCEPT_S)
    except (OSError, asyncio.TimeoutError):  # noqa: UP041  # in Python 3.10 it is not TimeoutError
        return None
    writer.close()
    # To an address of its own, the system chooses the same address for both ends.
    return bool(writer.get_extra_info("sockname")[0] == parts.hostname)


async def _reachable(servers: list[FoundServer]) -> FoundServer | None:
    """Return the first of these that accepts a connection, preferably on another machine.

    The address of a server's Docker bridge is often also one of this machine, where something else may listen.
    """
    are_here = await asyncio.gather(*(_is_here(server.address) for server in servers))
    found = [(is_here, server) for is_here, server in zip(are_here, servers, strict=True) if is_here is not None]
    return min(found, key=lambda pair: pair[0], default=(None, None))[1]


async def _browse(seconds: float, interfaces: Sequence[str] | None) -> list[FoundServer]:
    """Listen for servers, and return those of which an address was found that accepts a connection in that time."""
    try:
        from zeroconf import Error, InterfaceChoice, ServiceStateChange
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf
    except ModuleNotFoundError:
        raise ModuleNotFoundError("to find servers, install the package zeroconf: pip install zeroconf") from None
    looks: dict[str, asyncio.Task[FoundServer | None]] = {}

    async def look(zeroconf: Any, name: str) -> FoundServer | None:
        try:
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            is_complete = await info.async_request(zeroconf, 1000 * seconds)
        except Error:  # another program published something that is not a name of a server
            return None
        return await _reachable(FoundServer.all_of(info)) if is_complete else None

    def on_change(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        if name in looks:
            looks.pop(name).cancel()
        if state_change is not ServiceStateChange.Removed:
            looks[name] = asyncio.create_task(look(zeroconf, name))

    async with AsyncZeroconf(InterfaceChoice.All if interfaces is None else list(interfaces)) as network:
        browser = AsyncServiceBrowser(network.zeroconf, SERVICE_TYPE, handlers=[on_change])
        await asyncio.sleep(seconds)
        await browser.async_cancel()
        found = [looks[name].result() for name in sorted(looks) if looks[name].done()]
    return [server for server in found if server is not None]


class Call(NamedTuple):
    """One HTTP request. tensor: its body. is_quiet: its bytes are not reported as progress."""

    method: str
    url: str
    params: Sequence[tuple[str, Any]] = ()
    tensor: torch.Tensor | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    is_quiet: bool = False


class Answer(NamedTuple):
    """A complete answer with a status below 400."""

    status: int
    body: bytearray
    headers: Any


class Job:
    """A request that one server computes while the client asks for its progress.

    key: by which the server finds the job when the request is sent again. address: None until the server has told it.
    unwanted: set when the client has stopped waiting for the job.
    """

    def __init__(self) -> None:
        """Note that there is no job yet."""
        self.unwanted = threading.Event()
        self.renew()

    def renew(self) -> None:
        """Note that the next request is another job."""
        self.key = uuid.uuid4().hex
        self.address: str | None = None


class Attempt(Exception):
    """One attempt that failed and may succeed later or elsewhere.

    wait_s: how long to wait before this server is asked again; None if asking it again does not help.
    is_busy: the server is only busy, so that waiting for it is not a failure.
    """

    def __init__(self, error: RemoteVAEError, wait_s: float | None, *, is_busy: bool = False) -> None:
        """Make the note."""
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s
        self.is_busy = is_busy


class Upload:
    """A body whose progress is reported."""

    def __init__(self, data: memoryview, progress: Progress) -> None:
        """Make the body. data: bytes that nobody changes or frees while they are sent."""
        self._data, self._sent, self._progress = data, 0, progress

    def __len__(self) -> int:
        """Return the length, from which requests makes the Content-Length header."""
        return len(self._data)

    def __iter__(self) -> Iterator[memoryview]:
        """Yield the chunks of the body."""
        while len(chunk := self.read(CHUNK_BYTES)):
            yield chunk

    def read(self, size: int = -1) -> memoryview:
        """Return the next bytes."""
        chunk = self._data[self._sent : self._sent + CHUNK_BYTES if size >= 0 else None]
        self._sent += len(chunk)
        self._progress("send", self._sent, len(self._data))
        return chunk


class KeyAuth(requests.auth.AuthBase):
    """Sends the key. An `auth` object keeps requests from taking another password from ~/.netrc."""

    def __init__(self, key: str | None) -> None:
        """Keep the key; None sends none. Raises ValueError, which does not show it, if no header can hold it."""
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("key: it has characters that are not printable ASCII; check for a line break at its end")
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the header."""
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Pool:
    """Asks one of several servers: another one if a server fails, and the same one later if it is busy."""

    def __init__(
        self,
        servers: list[Server],
        key: str | None,
        timeout: Timeout,
        retries: int,
        progress: Progress,
        has_jobs: bool = False,
    ) -> None:
        """Make a pool.

        retries: how often all servers are asked again after a failure. has_jobs: whether tensors are sent as jobs.
        """
        self.servers, self.timeout, self.retries, self.progress = servers, timeout, retries, progress
        self.has_jobs = has_jobs
        self.session = requests.Session()
        if key is not None or not any("@" in server.base for server in servers):
            self.session.auth = KeyAuth(key)

    def ask(
        self,
        method: str,
        route: Callable[[Server], str],
        params: Sequence[tuple[str, Any]] = (),
        tensor: torch.Tensor | None = None,
    ) -> Answer:
        """Return the answer of the first server that gives one. Raises RemoteVAEError.

        tensor: the body, a contiguous tensor on the CPU.
        """
        deadline, failures = time.monotonic() + self.timeout.total, 0
        servers = list(self.servers)
        jobs = {server: Job() for server in servers} if self.has_jobs and tensor is not None else {}
        try:
            while True:
                notes: list[Attempt] = []
                for server in list(servers):
                    try:
                        call = Call(method, route(server), [*server.query, *params], tensor)
                        answer = self._attempt(server, call, deadline, jobs.get(server))
                    except Attempt as note:
                        notes.append(note)
                        if note.wait_s is None:
                            servers.remove(server)
                    else:
                        self._prefer(server)
                        return answer
                waits = [note.wait_s for note in notes if note.wait_s is not None]
                failures += not any(note.is_busy for note in notes)
                if not waits or failures > self.retries or time.monotonic() + min(waits) >= deadline:
                    raise notes[-1].error
                self._wait(min(waits))
        finally:
            for job in jobs.values():
                self._cancel(job)

    def _prefer(self, server: Server) -> None:
        """Ask this server first the next time."""
        self.servers = sorted(self.servers, key=lambda each: each != server)  # another thread may be reading the list

    def _wait(self, seconds: float) -> None:
        self.progress("wait", 0, seconds)
        time.sleep(seconds)
        self.progress("wait", seconds, seconds)

    def _attempt(self, server: Server, call: Call, deadline: float, job: Job | None) -> Answer:
        """Ask one server, in a thread of its own, so that nothing takes longer than the deadline.

        job: of this server, if the request is sent as a job.
        """
        outcomes: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                if job is None:
                    outcomes.put(self._exchange(server, call, deadline))
                else:
                    outcomes.put(self._as_job(server, call, deadline, job))
            except BaseException as error:  # noqa: BLE001  # it is raised again in the thread that waits
                outcomes.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            outcome = outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            sentence = f"{server.label} did not answer within {self.timeout.total:g} s."
            raise Attempt(RemoteVAEError(sentence, code="timeout"), None) from None
        except BaseException:  # Ctrl-C
            if job is not None:
                job.unwanted.set()
                if job.address is None:  # perhaps the server has accepted the job, and its answer is on the way
                    thread.join(CANCEL_S)
            raise
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _as_job(self, server: Server, call: Call, deadline: float, job: Job) -> Answer:
        """Send a request as a job, follow it, and return its answer. Raises as `_exchange`.

        A job that the server has accepted is not sent again. A job whose answer is an error is over: the next attempt
        is another job.
        """
        if job.address is None:
            headers = {"Prefer": "respond-async", "Idempotency-Key": job.key}
            answer = self._exchange(server, call._replace(headers=headers), deadline)
            if answer.status != 202:  # a server without jobs has answered the request
                return answer
            job.address = server.base + urlsplit(answer.headers.get("Location", "")).path
        code = self._follow(server, job, deadline)
        try:
            return self._ask_for(server, job, deadline, "/result", code)
        except Attempt as note:
            if code is not None and note.error.code == code:
                self._delete(job)
                job.renew()
            raise

    def _follow(self, server: Server, job: Job, deadline: float) -> str | None:
        """Report the progress of a job until it has ended, and return the code of its error, or None.

        Raises as `_ask_for`.
        """
        began = time.monotonic()
        while True:
            answer = self._ask_for(server, job, deadline)
            try:
                told = json.loads(answer.body)
                state, share, code = told["state"], float(told["progress"]), told.get("code")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RemoteVAEError(f"{server.label} sent something other than a job; check the address.") from error
            self.progress("compute", share, 1.0)
            if state not in ("queued", "running"):
                return code
            job.unwanted.wait(min(POLL_S[1], max(POLL_S[0], (time.monotonic() - began) / 10)))

    def _ask_for(self, server: Server, job: Job, deadline: float, route: str = "", code: str | None = None) -> Answer:
        """Return the answer to a GET request for a job. Raises as `_exchange`.

        A connection or a proxy that fails is tried `retries` times, and a busy server until the deadline.
        code: the code of the job's error, which is raised at once.
        """
        failures = 0
        while True:
            if job.unwanted.is_set():
                self._delete(job)
                raise RemoteVAEError("the client has stopped waiting for this job")
            try:
                return self._exchange(server, Call("GET", f"{job.address}{route}", is_quiet=not route), deadline)
            except Attempt as note:
                error, wait_s = note.error, 1.0 if note.wait_s is None else note.wait_s
                if error.status not in PASSING or (code is not None and error.code == code):
                    raise
                failures += not note.is_busy
                if failures > self.retries or time.monotonic() + wait_s >= deadline:
                    raise Attempt(error, wait_s, is_busy=note.is_busy) from error
            except RemoteVAEError as error:
                if error.code != "not_found":
                    raise
                job.renew()  # the server was restarted, or had no room for the answer
                raise Attempt(error, 0.0) from error
            job.unwanted.wait(wait_s)

    def _cancel(self, job: Job) -> None:
        """Make the server stop a job, or forget its answer."""
        job.unwanted.set()
        self._delete(job)

    def _delete(self, job: Job) -> None:
        """Delete a job on its server. If that fails, the server forgets it some time after it has ended."""
        if job.address is not None:
            with suppress(requests.RequestException):
                self.session.delete(job.address, timeout=CANCEL_S).close()

    def _exchange(self, server: Server, call: Call, deadline: float) -> Answer:
        """Send one request and read its answer. Raises Attempt, RemoteVAEError."""
        left = max(0.001, deadline - time.monotonic())
        headers = {"X-Request-Timeout": f"{left:.3f}", **call.headers}
        report: Progress = (lambda *_: None) if call.is_quiet else self.progress
        body = None
        if call.tensor is not None:
            headers |= {"Content-Type": "tensor/binary", "Accept": "tensor/binary"}
            # numpy keeps the tensor alive, and the tensor its memory, until the body is sent.
            body = Upload(memoryview(call.tensor.view(torch.uint8).numpy()).cast("B"), report)
        limits = min(self.timeout.connect, left), min(self.timeout.read, left)
        try:
            with self.session.request(
                call.method, call.url, params=call.params, data=body, headers=headers, timeout=limits, stream=True
            ) as response:
                content = bytearray()
                total = int(response.headers.get("Content-Length") or 0) or None
                for chunk in response.iter_content(CHUNK_BYTES):
                    content += chunk
                    report("receive", len(content), total)
        except requests.RequestException as error:
            sentence = f"{server.label} cannot be reached or broke off ({_reason(error)})."
            if isinstance(error, requests.exceptions.SSLError):
                sentence += " Set REQUESTS_CA_BUNDLE to the file of its issuer's certificate, or check the address."
            raise Attempt(RemoteVAEError(sentence, code="unreachable"), 1.0) from error
        if response.ok:
            return Answer(response.status_code, content, response.headers)
        raise _refusal(server, response, content)


def _reason(error: BaseException) -> str:
    """Return the innermost cause of an error of requests in a few words."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"[:200]


def _refusal(server: Server, response: requests.Response, content: bytearray) -> Exception:
    """Return the error of an answer that is none, or an Attempt if another try may succeed."""
    status = response.status_code
    try:
        told = json.loads(content)
        sentence, code = str(told["error"]), told.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        sentence, code = content[:200].decode(errors="replace").strip() or response.reason, None
    error = RemoteVAEError(f"{server.label} answered {status}: {sentence}", status, code)
    wait = response.headers.get("Retry-After", "")
    if status in (429, 503) and code != "model_unavailable" and wait.isdecimal():
        return Attempt(error, float(wait), is_busy=True)
    if status in (408, 429, 502):
        return Attempt(error, 1.0)
    return Attempt(error, None) if status >= 500 else error


class RemoteVAE(torch.nn.Module):
    """A VAE whose decodes and encodes a server computes.

    config: the config of the VAE, by item and by attribute. `force_upcast` is False, because the server decides.
    dtype, device: follow `to()`. A result is on the device of the tensor that was sent, wherever this is.
    """

    use_tiling = use_slicing = False

    def __init__(
        self,
        address: str | Sequence[str],
        key: str | None = None,
        *,
        model: str | None = None,
        timeout: Timeout | Sequence[float] = Timeout(),  # noqa: B008  # it is immutable
        receive: str = "uint8",
        retries: int = 2,
        jobs: bool = False,
        progress: Progress | None = None,
        fallback: str | torch.nn.Module | Callable[[], Any] | None = None,
        save_latents: str | os.PathLike[str] | None = ".",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Ask the server for the model's config. Raises RemoteVAEError, and ValueError for a wrong argument.

        address: such as `http://host:8000/flux`; without a name, the server's default model. Several addresses are of
            servers of the same model: another one is asked if one fails.
        key: the API key. Default: the environment variable REMOTE_VAE_KEY. `http://user:KEY@host/` works too.
        model: the name of the model, if the address does not end with it.
        timeout: connect, read and total, in seconds.
        receive: the dtype in which decoded pixels are sent: `uint8`, 3 bytes a pixel and what an image file holds, or
            `float16` or `float32`.
        retries: how often to ask again if no server can be reached. A busy server is asked until the total timeout.
        jobs: send each decode and encode as a job and ask for its progress, so that no single HTTP request is long, and
            a proxy's time limit or a lost connection does not end the work. The address must lead to one server.
        progress: called with the stage, what is done, and the total; in a thread of its own.
        fallback: a local VAE to use, with a warning, while no server can. `local`: from the repository that the server
            names. Another text: from this repository or folder. Or a VAE, or a function that returns one when it is
            first needed.
        save_latents: the folder into which the latents of a failed decode are saved; None does not save them.
        dtype: the first value of `dtype`.
        """
        super().__init__()
        if receive not in ("uint8", "float16", "float32"):
            raise ValueError(f"receive must be uint8, float16 or float32, not {receive!r}")
        servers = [Server.of(each, model) for each in ([address] if isinstance(address, str) else address)]
        if not servers:
            raise ValueError("give the address of at least one server")
        self._receive = receive
        # Inside a list and a function, because torch would move a module in an attribute along with this one.
        self._local: list[Any] = []
        self._fallback = (lambda: fallback) if isinstance(fallback, torch.nn.Module) else fallback
        self._save_latents = None if save_latents is None else Path(save_latents)
        key = os.environ.get("REMOTE_VAE_KEY") if key is None else key
        self._pool = Pool(servers, key, Timeout(*timeout), retries, progress or (lambda *_: None), jobs)
        # A weight without values, which `to()` and the hooks of accelerate move, as they expect of a module.
        self._placed = torch.nn.Parameter(torch.zeros(0, dtype=dtype), requires_grad=False)
        self._entry = self._describe()
        self._take_over()

    # What pipelines read.

    @property
    def __class__(self) -> type:  # type: ignore[override]  # so that isinstance finds the VAE's class
        """The class in diffusers, for pipelines that ask with isinstance. `type()` gives RemoteVAE."""
        return self.__dict__.get("_imitated") or RemoteVAE

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that pipelines cast to."""
        return self._placed.dtype

    @property
    def device(self) -> torch.device:
        """The device that pipelines move to."""
        return self._placed.device

    def __getattr__(self, name: str) -> Any:
        """Return an entry of the config as an attribute, as the VAEs of diffusers do."""
        config = self.__dict__.get("config", {})
        return config[name] if name in config else super().__getattr__(name)

    def extra_repr(self) -> str:
        """Return the addresses and the class, without a key."""
        return f"{', '.join(each.label for each in self._pool.servers)}: {self._entry['class']}"

    def _no_effect(self, *_: Any, **__: Any) -> None:
        """Do nothing: tiles, slices and attention are the server's concern."""

    enable_tiling = disable_tiling = enable_slicing = disable_slicing = _no_effect
    enable_xformers_memory_efficient_attention = disable_xformers_memory_efficient_attention = _no_effect
    fuse_qkv_projections = unfuse_qkv_projections = set_attn_processor = set_default_attn_processor = _no_effect

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Save nothing, with a warning, so that the other parts of a pipeline can be saved."""
        warnings.warn("a RemoteVAE is not saved; load the pipeline with vae=RemoteVAE(…)", stacklevel=2)

    @staticmethod
    def servers(timeout: float = 2.0, interfaces: Sequence[str] | None = None) -> list[FoundServer]:
        """Return the servers that advertise themselves on the local network (`serve --advertise`), by name.

        timeout: how long to search for them, in seconds. interfaces: IP addresses of this machine, on whose networks to
            listen; default: on all.

        A server with several IP addresses is returned with one that accepts a connection from this machine, and is left
        out if there is none.
        Any machine of the network can advertise a server, so check the address before you send it a key.
        Raises ModuleNotFoundError if the package zeroconf is not installed, and OSError if the network cannot be used.
        """
        with ThreadPoolExecutor(1) as own_thread:
            return own_thread.submit(lambda: asyncio.run(_browse(timeout, interfaces))).result()

    # Decode and encode.

    def decode(
        self,
        z: torch.Tensor,
        *positional: Any,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        temb: torch.Tensor | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        **others: Any,
    ) -> Decoded | tuple[torch.Tensor]:
        """Decode latents, as `vae.decode` of the model's class does.

        z: unscaled latents, as the pipelines give them. positional: some classes take `temb`, others `num_frames` or
            `return_dict` as the second argument; the value tells which.

        Returns an object with `sample`, or a tuple. Half-precision latents give a float16 sample.
        Raises RemoteVAEError, which has the latents, and ValueError for an argument that the server does not know.
        """
        for value in positional:
            if isinstance(value, bool):
                return_dict = value
            elif isinstance(value, int):
                num_frames = value
            elif isinstance(value, torch.Generator):
                generator = value
            elif value is not None:
                temb = value
        if unknown := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"a remote decode cannot take {', '.join(unknown)}; leave it out")
        _check_gradient(z)
        self._run_hook()
        given: dict[str, Any] = {"temb": temb, "num_frames": num_frames, "generator": generator}
        given["num_inference_steps"] = num_inference_steps
        try:
            sample = torch.cat(list(self._decode_parts(z.detach(), **given)))
        except RemoteVAEError as error:
            if not self._falls_back(error):
                self._keep(error, z)
                raise
            try:
                sample = self._local_vae(error, z).decode(z, **_set(given), return_dict=False)[0]
            except Exception as problem:  # whatever a local VAE raises, the latents are kept
                error.add(f"The local VAE failed too ({type(problem).__name__}: {str(problem)[:200]}).")
                self._keep(error, z)
                raise error from problem
        return Decoded(sample) if return_dict else (sample,)

    def encode(self, x: torch.Tensor, *positional: Any, return_dict: bool = True, **others: Any) -> Any:
        """Encode pixels, as `vae.encode` of the model's class does.

        x: `[B, C, H, W]` or `[B, C, F, H, W]`, in [-1, 1].

        Returns an object with `latent_dist`, or with `latents` for a class without a posterior; or a tuple. The latents
        are not scaled. Raises RemoteVAEError.
        """
        return_dict = next((each for each in positional if isinstance(each, bool)), return_dict)
        if unknown := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"a remote encode cannot take {', '.join(unknown)}; leave it out")
        _check_gradient(x)
        self._run_hook()
        try:
            parameters = self._encode(x.detach())
        except RemoteVAEError as error:
            if not self._falls_back(error):
                raise
            return self._local_vae(error, x).encode(x, return_dict=return_dict)
        if self._entry["latents"]["has_posterior"]:
            encoded: Any = Encoded(Posterior(parameters))
        elif self._entry["class"] == "AutoencoderKLCosmos":
            encoded = Encoded(Certain(parameters))
        else:
            encoded = EncodedLatents(parameters)
        return encoded if return_dict else tuple(encoded)

    def forward(self, sample: torch.Tensor, num_frames: int | None = None, return_dict: bool = True) -> Any:
        """Encode pixels and decode the most likely latents. Pipelines look here whether `decode` takes `num_frames`."""
        encoded = self.encode(sample)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return self.decode(latents, num_frames=num_frames, return_dict=return_dict)

    async def adecode(self, z: torch.Tensor, *positional: Any, **given: Any) -> Any:
        """Decode without blocking the event loop. Parameters as for `decode`."""
        return await asyncio.to_thread(self.decode, z, *positional, **given)

    async def aencode(self, x: torch.Tensor, *positional: Any, **given: Any) -> Any:
        """Encode without blocking the event loop. Parameters as for `encode`."""
        return await asyncio.to_thread(self.encode, x, *positional, **given)

    def decode_scaled(
        self,
        latents: torch.Tensor,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
    ) -> torch.Tensor:
        """Decode the latents of a pipeline, packed or not, which the server unscales with the model's own statistics.

        height, width: in pixels, needed for packed latents. num_frames: needed for CogVideoX 1.5 only.
        Returns uint8 pixels `[B, H, W, C]`, or `[B, F, H, W, C]` of a video model, on the CPU. Raises RemoteVAEError.
        """
        sizes = _set({"height": height, "width": width, "num_frames": num_frames})
        try:
            pixels = self._send(latents, [*_PIXELS, ("do_scaling", "True"), *sizes.items()])
        except RemoteVAEError as error:
            self._keep(error, latents)
            raise
        return pixels.unflatten(0, (len(latents), -1)) if self._is_video and latents.ndim != 4 else pixels

    def encode_scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Encode pixels to latents as the pipelines use them, scaled by the server and not packed.

        x: `[B, C, H, W]` or `[B, C, F, H, W]`, in [-1, 1], or uint8. Raises RemoteVAEError.
        """
        return self._send(x, [("do_scaling", "True")], "encode").to(x.device)

    # How they are computed.

    @property
    def _is_video(self) -> bool:
        return self._entry["latents"]["kind"] == "video"

    def _decode_parts(
        self,
        z: torch.Tensor,
        temb: torch.Tensor | None,
        num_frames: int | None,
        generator: Any,
        num_inference_steps: int | None,
    ) -> Iterator[torch.Tensor]:
        """Yield the samples of as many latents at a time as the server takes."""
        times = [] if temb is None else temb.flatten().tolist()
        is_one_tensor_of_frames = self._is_video and self._receive == "uint8"  # which holds only one video
        most = 1 if is_one_tensor_of_frames else self._entry["limits"]["max_batch"]
        size = 1 if len(set(times)) > 1 else most * (num_frames or 1)
        about: dict[str, Any] = {}
        if self._entry["latents"]["takes_seed"]:
            about["decode_steps"] = num_inference_steps
            about["seed"] = generator.initial_seed() % 2**64 if isinstance(generator, torch.Generator) else None
        for start in range(0, len(z), size):
            about["decode_timestep"] = times[min(start, len(times) - 1)] if times else None
            yield self._decode(z[start : start + size], num_frames, _set(about))

    def _decode(self, z: torch.Tensor, num_frames: int | None, about: dict[str, Any]) -> torch.Tensor:
        """Return the sample in the axes and the range of the model's class."""
        kind = self._entry["class"]
        wire = z
        if kind == "AutoencoderKLTemporalDecoder":
            wire = z.unflatten(0, (-1, num_frames or 1))  # [B F, C, h, w] -> [B, F, C, h, w]
        elif kind in ("AutoencoderKLCogVideoX", "TAECVX"):  # the order that the server reads first
            wire = z.transpose(1, 2)  # [B, C, F, h, w] -> [B, F, C, h, w]
        is_stack = not self._is_video and z.ndim == 5  # images with an axis of one frame
        if is_stack:
            wire = z.squeeze(2)
        is_bytes = self._receive == "uint8"
        form = _PIXELS if is_bytes else [("output_type", "pt"), ("output_dtype", self._receive)]
        pixels = self._send(wire, [*form, *about.items()]).to(z.device)
        if is_bytes and self._is_video:
            pixels = pixels.unflatten(0, (len(wire), -1))  # [B F, H, W, C] -> [B, F, H, W, C]
        if is_bytes:
            pixels = pixels.movedim(-1, 1).float() / 127.5 - 1  # [B, C, (F,) H, W]
        if is_stack:
            pixels = pixels.unsqueeze(2)
        if kind == "AutoencoderKLTemporalDecoder":
            pixels = pixels.transpose(1, 2).flatten(0, 1)  # [B, C, F, H, W] -> [B F, C, H, W]
        elif kind == "AutoencoderKLAllegro":
            pixels = pixels.transpose(1, 2)  # [B, C, F, H, W] -> [B, F, C, H, W]
        elif kind == "AutoencoderKLMiniMaxH3":
            pixels = (pixels.float() / 2 + 0.5 - _axes(IMAGENET_MEAN, pixels)) / _axes(IMAGENET_STD, pixels)
        dtype = torch.float32 if z.dtype.itemsize > 2 else torch.float16  # bfloat16 would not hold 256 levels
        return pixels.to(dtype).contiguous()

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the parameters of the posterior, or latents for a class without one, in the axes of the class."""
        kind = self._entry["class"]
        is_stack = not self._is_video and x.ndim == 5
        is_single = self._is_video and x.ndim == 4
        wire = x
        if kind == "AutoencoderKLMiniMaxH3":
            wire = 2 * (x.float() * _axes(IMAGENET_STD, x) + _axes(IMAGENET_MEAN, x)) - 1
        if is_stack:
            wire = wire.squeeze(2)
        elif is_single:
            wire = wire.unsqueeze(2)
        posterior = [("posterior", "True")] if self._entry["latents"]["has_posterior"] else []
        steps = self._entry["limits"]["max_batch"]
        parts = [self._send(wire[start : start + steps], posterior, "encode") for start in range(0, len(x), steps)]
        latents = torch.cat(parts).to(x.device, x.dtype)
        if is_stack:
            return latents.unsqueeze(2)
        return latents.squeeze(2) if is_single else latents

    def _send(self, tensor: torch.Tensor, params: Sequence[tuple[str, Any]], *route: str) -> torch.Tensor:
        """Send a tensor, and return the tensor of the answer, on the CPU. Raises RemoteVAEError."""
        known = tensor.dtype if str(tensor.dtype).removeprefix("torch.") in DTYPES else torch.float32
        body = tensor.detach().to("cpu", known).contiguous()
        about = [*(("shape", size) for size in body.shape), ("dtype", str(known).removeprefix("torch."))]
        answer = self._pool.ask("POST", lambda server: server.route(*route), [*about, *params], body)
        try:
            shape, dtype = json.loads(answer.headers["shape"]), DTYPES[answer.headers["dtype"]]
            return torch.frombuffer(answer.body, dtype=dtype).reshape(shape)
        except (KeyError, ValueError, RuntimeError) as error:
            label = self._pool.servers[0].label
            raise RemoteVAEError(f"{label} sent something other than a tensor; check the address.") from error

    def _run_hook(self) -> None:
        """Run the hook of accelerate, which makes `enable_model_cpu_offload` unload the model before this one."""
        hook = getattr(self, "_hf_hook", None)
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(self)

    # What the server knows.

    def _describe(self) -> dict[str, Any]:
        """Return what the server says of the model. It loads the model if that is needed to tell its statistics."""
        entry = self._find()
        if "latents" not in entry:  # the server has not read its config yet: it does before it refuses this
            try:
                self._send(torch.zeros(1), [])
            except RemoteVAEError as error:
                if error.status != 400:
                    raise
            entry = self._find()
        if entry["class"] in KEEP_STATISTICS and not entry.get("statistics"):
            frames = (2,) if entry["latents"]["kind"] == "video" else ()
            self._send(torch.zeros(1, entry["latents"]["channels"], *frames, 4, 4), _PIXELS)
            entry = self._find()
            if not entry.get("statistics"):
                label = self._pool.servers[0].label
                raise RemoteVAEError(f"{label} does not tell the statistics of this model, which pipelines need")
        return entry

    def _find(self) -> dict[str, Any]:
        """Return the model's entry of GET /models. Raises RemoteVAEError."""
        server = self._pool.servers[0]
        answer = self._pool.ask("GET", lambda each: f"{each.base}/models")
        try:
            listed = json.loads(answer.body)
            models, wanted = listed["models"], (server.model or listed["default"]).lower()
            found = [each for each in models if wanted in (each["name"].lower(), *map(str.lower, each["aliases"]))]
        except (ValueError, KeyError, TypeError) as error:
            raise RemoteVAEError(f"{server.label} is not a VAE decode server: its /models is not a list") from error
        if not found:
            names = ", ".join(each["name"] for each in models)
            raise RemoteVAEError(f"{server.label}: this server has no model '{wanted}'; it has {names}", 404)
        return found[0]

    def _take_over(self) -> None:
        """Take the config, the attributes and the class of the model over."""
        entry, latents = self._entry, self._entry["latents"]
        if "config" not in entry:
            label = self._pool.servers[0].label
            raise RemoteVAEError(f"{label} does not list the config of its models; update the server")
        self.config = Config(entry["config"], force_upcast=False)
        self.spatial_compression_ratio = latents["vae_scale_factor"]
        ratio = self.config.get("temporal_compression_ratio")
        self.temporal_compression_ratio = ratio or latents["temporal_compression_ratio"]
        if "clip_length" in self.config:
            self.tokens_chunk_size = -(-self.config.clip_length // self.temporal_compression_ratio)
        statistics = {name: torch.tensor(values) for name, values in entry.get("statistics", {}).items()}
        for name in statistics.keys() & {"latents_mean", "latents_std"}:
            self.register_buffer(name, statistics[name], persistent=False)
        if "bn.running_mean" in statistics:
            mean, variance = statistics["bn.running_mean"], statistics["bn.running_var"]
            self.bn = torch.nn.BatchNorm2d(len(mean), eps=self.config.batch_norm_eps, affine=False).eval()
            self.bn.running_mean, self.bn.running_var = mean, variance
        imitated = getattr(sys.modules.get("diffusers"), entry["class"], None)
        if isinstance(imitated, type):
            self.__dict__["_imitated"] = imitated
            self.__module__ = imitated.__module__

    # What happens after a failure.

    def _falls_back(self, error: RemoteVAEError) -> bool:
        """Return whether a local VAE does the work after this error."""
        return self._fallback is not None and not error.is_of_the_request

    def _local_vae(self, error: RemoteVAEError, tensor: torch.Tensor) -> Any:
        """Return the local VAE, on the device and in the dtype of the tensor, with a warning. Raises whatever fails."""
        warnings.warn(f"{error} The local VAE is used.", stacklevel=3)
        if not self._local:
            self._local.append(self._load_local())
        return self._local[0].to(tensor.device, tensor.dtype)

    def _load_local(self) -> Any:
        if callable(self._fallback):
            return self._fallback()
        import diffusers

        repo, where = self._fallback, {}
        if repo == "local":
            repo = self._entry["repo"]
            if repo.startswith("a local "):  # which the server says instead of the path
                raise ValueError("the server loads this model from a folder; give fallback one of this machine")
            where = _set({"subfolder": self._entry["subfolder"], "revision": self._entry["revision"]})
        return getattr(diffusers, self._entry["class"]).from_pretrained(repo, **where).eval()

    def _keep(self, error: RemoteVAEError, z: torch.Tensor) -> None:
        """Keep the latents in the error, and in a file if that can be written."""
        error.latents = z.detach().cpu()
        if self._save_latents is not None:
            try:
                error.latents_file = save(error.latents, self._save_latents)
            except OSError as problem:
                warnings.warn(f"the latents cannot be saved in {self._save_latents}: {problem}", stacklevel=4)


_PIXELS = [("output_type", "pt"), ("partial_postprocess", "True")]


def save(latents: torch.Tensor, folder: Path) -> Path:
    """Save latents in a new safetensors file, under the name `latents`, and return its path. Raises OSError."""
    name = str(latents.dtype).removeprefix("torch.")
    if name not in SAFETENSORS_NAMES:
        latents, name = latents.float(), "float32"
    data = latents.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    about = {"dtype": SAFETENSORS_NAMES[name], "shape": list(latents.shape), "data_offsets": [0, len(data)]}
    header = json.dumps({"latents": about}).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    number, path = tempfile.mkstemp(".safetensors", time.strftime("latents-%Y%m%d-%H%M%S-"), folder)
    with os.fdopen(number, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + data)
    return Path(path)


def _set(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _axes(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Return values for the channels of a video, `[1, C, 1, 1, 1]`."""
    return torch.tensor(values, device=like.device).view(1, -1, 1, 1, 1)


def _check_gradient(tensor: torch.Tensor) -> None:
    """Raise ValueError if the caller wants a gradient, which a remote VAE does not have."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError("a remote VAE has no gradient; call it under torch.no_grad(), or use a local VAE")


try:
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam
except ImportError:  # without diffusers there are no pipelines, and without modular ones no blocks
    pass
else:

    class RemoteDecodeStep(ModularPipelineBlocks):
        """The last block of a modular pipeline: the server unpacks, unscales and decodes the latents.

        It works with the latents of every model, so that it takes the place of the blocks that unpack and decode.
        """

        @property
        def description(self) -> str:
            """What the block does."""
            return "Decodes the latents of the pipeline, packed or not, on a VAE decode server."

        @property
        def expected_components(self) -> list[ComponentSpec]:
            """The components of the block."""
            return [ComponentSpec("vae", RemoteVAE)]

        @property
        def inputs(self) -> list[InputParam]:
            """The inputs of the block."""
            return [
                InputParam("latents", required=True, type_hint=torch.Tensor, description="as the pipeline holds them"),
                InputParam("height", type_hint=int, description="of the pixels, for packed latents"),
                InputParam("width", type_hint=int, description="of the pixels, for packed latents"),
                InputParam("num_frames", type_hint=int, description="of the video, for CogVideoX 1.5"),
                InputParam("output_type", default="pil", type_hint=str, description="pil, np or pt"),
            ]

        @property
        def intermediate_outputs(self) -> list[OutputParam]:
            """The outputs of the block: one of them is None."""
            return [
                OutputParam("images", description="the images of an image model"),
                OutputParam("videos", description="the videos of a video model, each a list of frames for pil"),
            ]

        @torch.no_grad()
        def __call__(self, components: Any, state: Any) -> Any:
            """Run the block."""
            block = self.get_block_state(state)
            pixels = components.vae.decode_scaled(block.latents, block.height, block.width, block.num_frames)
            is_video = pixels.ndim == 5
            frames = pixels.flatten(0, -4)  # [B F, H, W, C]
            if block.output_type == "pil":
                made: Any = VaeImageProcessor.numpy_to_pil(frames.numpy() / 255.0)
                length = pixels.shape[1]
                made = [made[start : start + length] for start in range(0, len(made), length)] if is_video else made
            else:
                unit = pixels.float() / 255
                made = unit.numpy() if block.output_type == "np" else unit.movedim(-1, -3)  # [B, (F,) C, H, W]
            block.images, block.videos = (None, made) if is_video else (made, None)
            self.set_block_state(state, block)
            return components, state

    class RemoteEncodeStep(ModularPipelineBlocks):
        """The block that encodes the input of an image-to-image pipeline: the server encodes and scales the pixels."""

        @property
        def description(self) -> str:
            """What the block does."""
            return "Encodes an image to scaled latents on a VAE decode server."

        @property
        def expected_components(self) -> list[ComponentSpec]:
            """The components of the block."""
            return [ComponentSpec("vae", RemoteVAE)]

        @property
        def inputs(self) -> list[InputParam]:
            """The inputs of the block."""
            return [
                InputParam("image", required=True, description="a PIL image, several, or a tensor in [-1, 1]"),
                InputParam("height", type_hint=int, description="to resize the image to"),
                InputParam("width", type_hint=int, description="to resize the image to"),
            ]

        @property
        def intermediate_outputs(self) -> list[OutputParam]:
            """The output of the block."""
            return [OutputParam("image_latents", type_hint=torch.Tensor, description="scaled, not packed")]

        @torch.no_grad()
        def __call__(self, components: Any, state: Any) -> Any:
            """Run the block."""
            block = self.get_block_state(state)
            pixels = block.image
            if not isinstance(pixels, torch.Tensor):
                processor = VaeImageProcessor(vae_scale_factor=components.vae.spatial_compression_ratio)
                pixels = processor.preprocess(pixels, height=block.height, width=block.width)
            block.image_latents = components.vae.encode_scaled(pixels)
            self.set_block_state(state, block)
            return components, state
