"""Serve the decode and encode routes: receive a request, parse it, wait for its result, send the answer."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .. import contract, values
from ..config import ServerOptions
from ..errors import BadRequest, ServerError
from ..inputs import VIDEO_TYPE, media_type_of
from ..inputs.tensor import SOUND
from ..model_info import Direction, ModelInfo
from ..outputs import format_named, with_sound
from ..scheduling.admission import Admission
from ..scheduling.service import Service
from .jobs import Jobs, accepted, hashed, new_id, wants_job
from .receive import BodyThreads, check_declared, declared_length, receive, receive_whole
from .responses import BrokenAnswer, InPieces, Streamed, response_of, send_all, unless_client_left

MOST_PARAMETERS = 256  # the most `&` in a query, because parsing thousands of parameters would block the event loop


class Work:
    """The endpoint of the decode routes or of the encode routes.

    It is an ASGI application and not a function that returns a response, because the memory of a request must stay
    counted until its answer has been sent.
    """

    def __init__(self, direction: Direction) -> None:
        """Make the endpoint of one direction."""
        self._direction = direction

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises ServerError if it fails, ClientDisconnect if the client leaves."""
        request = Request(scope, receive, send)
        service: Service = request.app.state.service
        if scope["query_string"].count(b"&") > MOST_PARAMETERS:
            raise BadRequest(f"the query has more than {MOST_PARAMETERS} parameters; send fewer")
        _note_model(request, service)
        patience_s = contract.patience_s(request.headers.get("x-request-timeout"))
        if wants_job(request):
            await (await self._accept(request, service, patience_s, send))(scope, receive, send)
            return
        with service.admitted(peer_of(request), patience_s) as admission, ExitStack() as until_sent:
            intake = Intake(request, service, admission, send)
            try:
                async with service.in_time(admission):
                    received = await intake.receive(self._direction)
                    until_sent.enter_context(service.answering())
                    with service.place(admission):
                        response = await unless_client_left(request, _answer(intake, received))
                    del received  # its bytes are no longer counted while the answer is sent
            except Exception as error:  # whatever it is, an answer that has begun must end visibly
                if intake.streamed is not None:
                    intake.streamed.cancel()  # nothing may be sent beside the error
                if intake.has_begun and not isinstance(error, ClientDisconnect):
                    raise BrokenAnswer(error if isinstance(error, ServerError) else ServerError()) from error
                raise
            admission.send(response.size_bytes)
            await send_all(request, response, send)

    async def _accept(self, request: Request, service: Service, patience_s: float | None, send: Send) -> Response:
        """Receive a request, begin to compute its answer, and return the response that names the job."""
        jobs: Jobs = request.app.state.jobs
        if not jobs.knows(request):
            jobs.check_room()
        # Received again also for a key that is known: only the body tells whether it is the same request.
        request, digest = hashed(request)
        with ExitStack() as held:
            admission = held.enter_context(service.admitted(peer_of(request), patience_s))
            intake = Intake(request, service, admission, send, may_stream=False)
            async with service.in_time(admission):
                received = await intake.receive(self._direction)
            job = jobs.find(request, digest)
            if job is None:
                held.enter_context(service.answering())
                held.enter_context(service.place(admission))
                jobs.check_room()
                job_id = new_id()
                intake.known_as += (job_id,)
                work = partial(_answer_in_time, intake, received)
                job = jobs.start(job_id, request, digest, work, held.pop_all())
        return accepted(job, service)


async def _answer(intake: Intake, received: Received) -> InPieces | Streamed:
    """Return the response, of which nothing is sent yet unless it is streamed."""
    if isinstance(received, VideoWithSound):
        return await _answer_with_sound(intake, received)
    request = received if isinstance(received, values.Request) else await intake.read_file(received)
    if intake.may_stream and format_named(request.job.format).stream_frames is not None:
        return await _stream(intake, request)
    result = await intake.service.answer(request, intake.admission, known_as=intake.known_as)
    intake.note(request.job, result)
    return response_of(request.job, result)


async def _answer_with_sound(intake: Intake, both: VideoWithSound) -> InPieces:
    """Decode the sound, which takes less time, then the video, and put both into one MP4."""
    try:
        sound = await intake.service.answer(both.sound, intake.admission)
    except BadRequest as error:
        error.name_tensor(SOUND)
        raise
    video = await intake.service.answer(both.video, intake.admission, known_as=intake.known_as)
    started = time.perf_counter()
    body = await intake.join(video.body.body, sound.body.body)
    render_ms = video.render_ms + sound.render_ms + (time.perf_counter() - started) * 1e3
    whole = replace(video, device_ms=video.device_ms + sound.device_ms, queue_ms=video.queue_ms + sound.queue_ms)
    result = whole.rendered(replace(video.body, body=body), render_ms)
    intake.note(both.video.job, result)
    return response_of(both.video.job, result)


async def _answer_in_time(intake: Intake, received: Received) -> InPieces | Streamed:
    """Return the response before the deadline of the request."""
    async with intake.service.in_time(intake.admission):
        return await _answer(intake, received)


async def _stream(intake: Intake, request: values.Request) -> InPieces | Streamed:
    """Send the pieces of an answer while it is computed, and return the response once all are computed."""
    streamed = intake.streamed = Streamed(request.job, intake.send)
    try:
        result = await intake.service.answer(request, intake.admission, streamed.put, intake.known_as)
    except BaseException:  # also when it is cancelled: the client must see that the answer is not complete
        streamed.cancel()
        raise
    intake.note(request.job, result)
    if result.body.body.nbytes:  # computed as a whole, where pieces cannot be passed on
        streamed.cancel()
        return response_of(request.job, result)
    streamed.end()
    return streamed


def peer_of(request: Request) -> str:
    """Return the address of the client; for IPv6 its /64 network, because one host may have all addresses of it."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host


def _note_model(request: Request, service: Service) -> None:
    """Note the model that the path or the query names, for the log and the metrics, before anything is refused."""
    word = request.path_params.get("model") or request.query_params.get("model")
    request.state.model = (service.settings.name_of(word) if word else service.settings.default) or "none"


@dataclass(frozen=True, slots=True)
class EncodeFile:
    """An image or video file to encode, which has been received but not parsed."""

    parameters: contract.Parameters
    accept: str
    info: ModelInfo
    data: bytes | bytearray


@dataclass(frozen=True, slots=True)
class VideoWithSound:
    """Two decodes for one MP4."""

    video: values.Request
    sound: values.Request


Received = values.Request | VideoWithSound | EncodeFile


class Intake:
    """Receives one request, and holds memory for it.

    known_as: the ids by which its progress can be asked for.
    streamed: the answer, if it is sent while it is computed.
    """

    def __init__(
        self, request: Request, service: Service, admission: Admission, send: Send, *, may_stream: bool = True
    ) -> None:
        """Begin to receive an admitted request. may_stream: the answer may be sent while it is computed."""
        self.service = service
        self.admission = admission
        self.send = send
        self.may_stream = may_stream
        self.known_as: tuple[str, ...] = (request.state.request_id,)
        self.streamed: Streamed | None = None
        self._request = request
        self._options: ServerOptions = service.settings.options
        self._threads: BodyThreads = request.app.state.body_threads

    @property
    def has_begun(self) -> bool:
        """Whether a part of the answer was sent while it is computed."""
        return self.streamed is not None and self.streamed.has_begun

    def note(self, job: values.Job, result: values.RenderedResult) -> None:
        """Note what the log says of an answer."""
        self._request.state.queue_ms, self._request.state.size = round(result.queue_ms), job.geometry.size_text

    def hold(self, size_bytes: int) -> None:
        """Hold this many bytes of memory until the answer is sent, instead of those held so far. Raises QueueFull."""
        self.admission.reserve(size_bytes)

    async def receive(self, asked: Direction) -> Received:
        """Receive a request. Return it, or an EncodeFile, from which `read_file` makes the request.

        Headers and query are parsed first, so that mistakes in them are refused before the body is received. A body
        without the parameter `shape` is a file, whose type is recognized by its bytes.

        asked: the direction of the route that the request was sent to. Raises ServerError.
        """
        is_encode, query = asked is Direction.ENCODE, self._request.query_params.multi_items()
        accept = ",".join(self._request.headers.getlist("accept"))
        is_tensor = contract.Parameters(query).has("shape")
        body: contract.Bytes | None
        file, in_body = await self._json(may_be_file=is_encode or not is_tensor) or (None, None)
        body, parameters = file, contract.Parameters(query, in_body)
        info = await self._model(parameters)
        if not parameters.has("shape"):
            if is_encode:
                self.service.check_loads(info.name, asked)
                contract.check_encode(parameters, accept, info)
            file = await self._file() if file is None else file
            parameters, body = contract.opened(parameters, file)
        direction = contract.direction_of(parameters, info, body, asked)
        self.service.check_loads(info.name, direction)
        if direction is Direction.DECODE:
            job = self._decode_job(parameters, accept, info)
            may_have_sound = file is not None and info.latents.kind == "video"
            sound = await self._sound(parameters, job, file) if may_have_sound and file is not None else None
            decode = await self._tensor(job, body, sound.job.bytes_held if sound else 0)
            return VideoWithSound(decode, sound) if sound else decode
        if parameters.has("shape"):
            return await self._tensor(contract.encode_job(parameters, accept, info), body)
        contract.check_encode(parameters, accept, info)
        assert file is not None
        return EncodeFile(parameters, accept, info, file)

    async def read_file(self, file: EncodeFile) -> values.Request:
        """Read the pixels of an image or video file on a thread, and return the request to encode them."""
        threads = self._threads.videos if media_type_of(file.data) == VIDEO_TYPE else self._threads.images
        on_thread = partial(threads.run, self.service, self.admission)
        header = await on_thread(contract.header_of, file.parameters, file.info, file.data)
        self.hold(contract.file_bytes_held(header, file.data))
        return await on_thread(contract.read_pixels, file.parameters, file.accept, file.info, file.data, header)

    async def _sound(
        self, parameters: contract.Parameters, video: values.Job, file: bytes | bytearray
    ) -> values.Request | None:
        """Return the request for the sound of a video, if the file contains its latents."""
        latents = contract.sound_in(file)
        if latents is None:
            return None
        name = self.service.settings.models[video.model].audio
        audio = await self.service.describe(name) if name else None
        sound = contract.sound_job(parameters, video, latents, audio)
        self.service.check_loads(sound.job.model, Direction.DECODE)
        return sound

    async def join(self, mp4: memoryview, wav: memoryview) -> memoryview:
        """Return one MP4 of a video and its sound, made on a thread."""
        return await self._threads.joins.run(self.service, self.admission, with_sound, mp4, wav)

    def _decode_job(self, parameters: contract.Parameters, accept: str, info: ModelInfo) -> values.Job:
        if not parameters.has("shape"):  # the body is no known file: its Content-Type may be the mistake
            contract.is_json_body(self._request.headers.get("content-type"), None)
        defaults = contract.RenderDefaults.of(self.service.settings, info.name)
        return contract.decode_job(parameters, accept, info, defaults, self.service.infos.values())

    async def _model(self, parameters: contract.Parameters) -> ModelInfo:
        """Return the model named by the path, else by the query, else the default model."""
        name = self.service.resolve(self._request.path_params.get("model") or parameters.text("model"))
        self._request.state.model = name
        return await self.service.describe(name)

    async def _json(self, *, may_be_file: bool) -> tuple[bytes | bytearray, Mapping[str, Any]] | None:
        """Receive a JSON body. Return the bytes that `inputs` encodes, and the parameters; None if it is not JSON."""
        headers = self._request.headers
        check_declared(declared_length(self._request), self._options.max_body_mb << 20)
        content_type, encoding = headers.get("content-type"), headers.get("content-encoding")
        if not contract.is_json_body(content_type, encoding, may_be_file=may_be_file):
            return None
        self.service.check_room(declared_length(self._request) or 0)
        body = await receive_whole(self._request, self.admission, self._options)
        self.hold(2 * len(body))  # the text, and the bytes that it encodes
        return await self._threads.json.run(self.service, self.admission, contract.read_json, body)

    async def _file(self) -> bytearray:
        """Receive a body whose type is recognized by its bytes."""
        self.service.check_room(declared_length(self._request) or 0)
        body = await receive_whole(self._request, self.admission, self._options)
        self.hold(len(body))
        return body

    async def _tensor(self, job: values.Job, body: contract.Bytes | None, more_bytes: int = 0) -> values.Request:
        """Return the request of a job.

        body: the bytes of the tensor; None if they have not been received yet. more_bytes: to hold beside the job's.
        """
        if body is None:
            check_declared(job.bytes_needed, self._options.max_body_mb << 20)
            if declared := declared_length(self._request):
                contract.check_length(job, declared)
            self.service.check_room(job.bytes_held)
            body = await receive(self._request, self.admission, job.bytes_needed, self._options.body_timeout_s)
        self.hold(job.bytes_held + more_bytes)
        return contract.with_data(job, body)
