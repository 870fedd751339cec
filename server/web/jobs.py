"""Requests whose client does not wait: `Prefer: respond-async` is answered with 202 and the address of a job.

Jobs are kept in memory. They end with the server, when they are deleted, some time after they are done, and, the oldest
first, when the answers together exceed `--job-results-mb` or a new job needs the place of one that is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from ..config import ServerOptions, paths
from ..errors import IdempotencyConflict, NotDone, NotFound, QueueFull, ServerError
from ..scheduling.service import Service
from .failures import failure
from .responses import InPieces, Streamed

log = logging.getLogger(__name__)

GONE = (
    "no such job: it was never accepted, was deleted, ended too long ago (--job-ttl-s), made room for later ones, or "
    "the server was restarted; send the request again"
)
NOT_YET_S = 1  # when to ask again for the result of a job that is not done
UNFETCHED_S = 60.0  # how long an unfetched answer is kept when there are too many jobs


class Digest(Protocol):
    """A digest of hashlib."""

    def hexdigest(self) -> str:
        """Return the digest of what was received so far."""
        ...


@dataclass(eq=False)
class AsyncJob:
    """A request that is computed while no client waits.

    fingerprint: what requests with the same `Idempotency-Key` must have in common. working: computes the response.
    ended: when that was done, as the event loop's time. is_fetched: a client has fetched its answer.
    """

    id: str
    request_id: str
    model: str
    fingerprint: tuple[str, ...]
    working: asyncio.Task[InPieces | Streamed | ServerError]
    key: tuple[str, str] | None = None
    ended: float | None = None
    size_bytes: int = field(default=0)
    is_fetched: bool = False

    @property
    def state(self) -> str:
        """`pending` until it has ended; then `done`, `failed` or `cancelled`."""
        if not self.working.done():
            return "pending"
        if self.working.cancelled():
            return "cancelled"
        return "failed" if isinstance(self.working.result(), ServerError) else "done"


class Jobs:
    """All jobs of a server, by id."""

    def __init__(self, options: ServerOptions) -> None:
        """Make a store without jobs."""
        self._most, self._ttl_s = options.max_jobs, options.job_ttl_s
        self._most_bytes = options.job_results_mb << 20
        self._jobs: dict[str, AsyncJob] = {}  # the oldest first
        self._by_key: dict[tuple[str, str], str] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def size_bytes(self) -> int:
        """The bytes of all answers that are kept."""
        return sum(job.size_bytes for job in self._jobs.values())

    def get(self, job_id: str) -> AsyncJob:
        """Return a job. Raises NotFound."""
        self._expire()
        if job_id not in self._jobs:
            raise NotFound(GONE)
        return self._jobs[job_id]

    def knows(self, request: Request) -> bool:
        """Return whether an earlier request had the same `Idempotency-Key`."""
        self._expire()
        return key_of(request) in self._by_key

    def find(self, request: Request, digest: Digest) -> AsyncJob | None:
        """Return the job of an earlier request with the same `Idempotency-Key`, if there is one.

        digest: of the body. Raises IdempotencyConflict if that was another request.
        """
        self._expire()
        key = key_of(request)
        job = self._jobs.get(self._by_key.get(key, "")) if key else None
        if job is not None and job.fingerprint != fingerprint_of(request, digest):
            raise IdempotencyConflict("this Idempotency-Key was used for another request; choose a new one")
        return job

    def check_room(self) -> None:
        """Raise QueueFull if there are as many jobs as may be, and no answer that may be dropped for another job.

        Those that were fetched go first, then those that nobody has fetched for UNFETCHED_S.
        """
        self._expire()
        if len(self._jobs) < self._most or self._drop_oldest(lambda job: job.is_fetched):
            return
        old = asyncio.get_running_loop().time() - UNFETCHED_S
        if not self._drop_oldest(lambda job: job.ended is not None and job.ended < old):
            raise QueueFull(
                f"{len(self._jobs)} jobs are waiting, in progress or not fetched yet; fetch or DELETE those that are "
                f"done, and try again in {NOT_YET_S} s",
                NOT_YET_S,
            )

    def start(
        self,
        job_id: str,
        request: Request,
        digest: Digest,
        work: Callable[[], Coroutine[Any, Any, InPieces | Streamed]],
        held: ExitStack,
    ) -> AsyncJob:
        """Begin to compute the answer to a request.

        job_id: the id of the new job. digest: of the body. held: what is released once the answer is computed.
        """

        async def run() -> InPieces | Streamed | ServerError:
            try:
                with held:
                    return await work()
            except ServerError as error:
                return without_frames(error)
            except Exception:  # the border of a job: its client gets an answer
                log.exception("a job failed", extra={"request_id": request.state.request_id})
                return ServerError()

        job = AsyncJob(
            job_id,
            request.state.request_id,
            request.state.model,
            fingerprint_of(request, digest),
            asyncio.create_task(run()),
            key_of(request),
        )
        self._jobs[job.id] = job
        if job.key:
            self._by_key[job.key] = job.id
        job.working.add_done_callback(lambda _: self._end(job))
        return job

    def delete(self, job_id: str) -> None:
        """Cancel a job and forget it. Raises NotFound."""
        self._forget(self.get(job_id))

    def close(self) -> None:
        """Cancel all jobs."""
        for job in list(self._jobs.values()):
            self._forget(job)

    def _end(self, job: AsyncJob) -> None:
        loop = asyncio.get_running_loop()
        job.ended = loop.time()
        loop.call_later(self._ttl_s, self._forget, job)
        answer = None if job.working.cancelled() else job.working.result()
        if isinstance(answer, Response):
            job.size_bytes = answer.size_bytes
        while self.size_bytes > self._most_bytes and self._drop_oldest(
            lambda other: other is not job and other.size_bytes
        ):
            pass

    def _drop_oldest(self, may_go: Callable[[AsyncJob], object]) -> bool:
        """Forget the job that ended first, of those that may go. Return whether there was one."""
        ended = [(job.ended, job) for job in self._jobs.values() if job.ended is not None and may_go(job)]
        if ended:
            self._forget(min(ended, key=lambda pair: pair[0])[1])
        return bool(ended)

    def _expire(self) -> None:
        oldest = asyncio.get_running_loop().time() - self._ttl_s
        for job in [job for job in self._jobs.values() if job.ended is not None and job.ended < oldest]:
            self._forget(job)

    def _forget(self, job: AsyncJob) -> None:
        job.working.cancel()
        self._jobs.pop(job.id, None)
        if job.key and self._by_key.get(job.key) == job.id:
            del self._by_key[job.key]


def without_frames(error: ServerError) -> ServerError:
    """Return an error without the frames in which it was raised, which would keep the request in memory."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def wants_job(request: Request) -> bool:
    """Return whether the client does not want to wait (RFC 7240)."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(preference.split(";")[0].strip().lower() == "respond-async" for preference in preferences)


def key_of(request: Request) -> tuple[str, str] | None:
    """Return the `Idempotency-Key` of a request with the name of its caller, else its address; None if it has none."""
    key, host = request.headers.get("idempotency-key"), request.client.host if request.client else ""
    return (getattr(request.state, "caller", host), key) if key else None


def fingerprint_of(request: Request, digest: Digest) -> tuple[str, ...]:
    """Return what two requests with the same `Idempotency-Key` must have in common. digest: of the body."""
    compared = (request.headers.get(name, "") for name in ("accept", "content-type"))
    return request.url.path, request.url.query, *compared, digest.hexdigest()


def hashed(request: Request) -> tuple[Request, Digest]:
    """Return the request, and a digest that becomes that of its body while the body is received."""
    digest, receive = hashlib.blake2b(digest_size=16), request.receive

    async def receive_hashed() -> Message:
        message = await receive()
        digest.update(message.get("body", b""))
        return message

    return Request(request.scope, receive_hashed), digest


def new_id() -> str:
    """Return an id that nobody can guess."""
    return secrets.token_hex(16)


def described(job: AsyncJob, service: Service) -> dict[str, Any]:
    """Return what `GET /jobs/{id}` says of a job."""
    place, answer = f"{paths.JOBS}/{job.id}", job.working.result() if job.state in ("done", "failed") else None
    known = {"id": job.id, "request_id": job.request_id, "model": job.model, "result": f"{place}/result"}
    if job.state == "pending":
        progress = service.progress(job.id)
        return known | (asdict(progress) if progress else {"state": "queued", "progress": 0.0})
    if isinstance(answer, ServerError):
        return known | {"state": "failed", "progress": 1.0, "error": str(answer), "code": answer.code}
    return known | {"state": job.state, "progress": 1.0, "size_bytes": job.size_bytes}


def accepted(job: AsyncJob, service: Service) -> Response:
    """Return the answer to a request that became a job."""
    headers = {"Location": f"{paths.JOBS}/{job.id}", "Preference-Applied": "respond-async"}
    return JSONResponse(described(job, service), 202, headers)


async def show(request: Request) -> Response:
    """Answer GET /jobs/{id}."""
    app = request.app.state
    return JSONResponse(described(app.jobs.get(request.path_params["id"]), app.service))


async def result(request: Request) -> Response:
    """Answer GET /jobs/{id}/result with the answer that the request would have got."""
    job: AsyncJob = request.app.state.jobs.get(request.path_params["id"])
    if job.state not in ("done", "failed"):
        raise NotDone("this job is not done; ask again, or GET its Location for its progress", NOT_YET_S)
    job.is_fetched = True
    answer = job.working.result()
    return failure(request, answer) if isinstance(answer, ServerError) else answer


async def cancel(request: Request) -> Response:
    """Answer DELETE /jobs/{id}: stop its work, and forget its answer."""
    request.app.state.jobs.delete(request.path_params["id"])
    return Response(status_code=204)


async def progress(request: Request) -> Response:
    """Answer GET /requests/{id}/progress, for a request that is being answered."""
    found = request.app.state.service.progress(request.path_params["id"])
    if found is None:
        raise NotFound("no request with this X-Request-Id waits or is computed")
    return JSONResponse(asdict(found))
