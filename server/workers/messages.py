"""The messages between the front process and a worker: length-prefixed MessagePack of plain data, never a pickle."""

from __future__ import annotations

import socket

import msgspec

from .. import errors
from ..model_info import CoderId, LoadedInfo, ModelInfo
from ..values import RenderedResult, Request

LENGTH_BYTES = 8


class Run(msgspec.Struct, tag=True, frozen=True):
    """Decode or encode the requests of one batch. is_short: they may run between the steps of longer work."""

    batch: int
    requests: list[Request]
    is_short: bool = False


class Drop(msgspec.Struct, tag=True, frozen=True):
    """Stop working on this request, because its client has left."""

    batch: int
    index: int


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Ask whether the worker still responds."""


class Pong(msgspec.Struct, tag=True, frozen=True):
    """Answer a Ping. steps: how many steps of work have begun on the device since the worker started."""

    steps: int


class Describe(msgspec.Struct, tag=True, frozen=True):
    """Read a model's config.json. is_local_only: do not use the network."""

    call: int
    model: str
    is_local_only: bool


class Load(msgspec.Struct, tag=True, frozen=True):
    """Load one direction of a model."""

    call: int
    coder: CoderId


class Failure(msgspec.Struct, frozen=True):
    """An error as data: one of `server.errors`, any other as a ServerError without details.

    kind: the name of its class. words: its sentence; for ModelUnavailable the model and the detail.
    """

    kind: str
    words: tuple[str, ...]
    retry_after_s: int | None = None
    operator_task: str | None = None

    @staticmethod
    def of(error: BaseException) -> Failure:
        """Return the error as data."""
        if isinstance(error, errors.ModelUnavailable):
            return Failure("ModelUnavailable", (error.model, error.detail), error.retry_after_s)
        if isinstance(error, errors.ServerError) and hasattr(errors, type(error).__name__):
            words = tuple(map(str, error.args))
            return Failure(type(error).__name__, words, error.retry_after_s, error.operator_task)
        return Failure("ServerError", ())

    def error(self) -> errors.ServerError:
        """Return the error as an exception."""
        kind: type[errors.ServerError] = getattr(errors, self.kind)
        if kind is errors.ModelUnavailable:
            model, detail = self.words
            return errors.ModelUnavailable(model, detail, retry_after_s=self.retry_after_s or 0)
        found = kind.__new__(kind)  # not by the arguments of its own constructor, which not every class has
        errors.ServerError.__init__(found, *self.words, operator_task=self.operator_task)
        found.retry_after_s = self.retry_after_s
        return found


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The worker has started.

    device: the device that it uses, as torch names it. devices: how many devices of that kind this machine has.
    """

    device: str
    devices: int


class Unusable(msgspec.Struct, tag=True, frozen=True):
    """The device does not exist. sentence: why, for the operator."""

    sentence: str


class Started(msgspec.Struct, tag=True, frozen=True):
    """The device has begun with a batch."""

    batch: int


class Progressed(msgspec.Struct, tag=True, frozen=True):
    """So many frames of a video are done."""

    batch: int
    index: int
    frames: int


class Emitted(msgspec.Struct, tag=True, frozen=True):
    """The next piece of the answer to a request whose format is streamed."""

    batch: int
    index: int
    piece: bytes


class Computed(msgspec.Struct, tag=True, frozen=True):
    """The device has finished a batch and is free. Its answers may still be rendered."""

    batch: int


class Finished(msgspec.Struct, tag=True, frozen=True):
    """A request has its answer."""

    batch: int
    index: int
    result: RenderedResult


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A request has failed."""

    batch: int
    index: int
    failure: Failure


class Replied(msgspec.Struct, tag=True, frozen=True):
    """Answer a Describe or a Load."""

    call: int
    info: ModelInfo | None = None
    failure: Failure | None = None


class Holds(msgspec.Struct, tag=True, frozen=True):
    """The models whose weights are on the device. Sent whenever that changes."""

    models: dict[str, LoadedInfo]


ToWorker = Run | Drop | Ping | Describe | Load
FromWorker = Pong | Ready | Unusable | Started | Progressed | Emitted | Computed | Finished | Failed | Replied | Holds

to_worker = msgspec.msgpack.Decoder(ToWorker)
from_worker = msgspec.msgpack.Decoder(FromWorker)
encoder = msgspec.msgpack.Encoder()


def encode(message: ToWorker | FromWorker, buffer: bytearray | None = None) -> bytearray:
    """Return a message with its length in front, ready to be sent.

    buffer: is overwritten and returned, so that a large message needs no new memory. Only for a sender that has sent
        the whole message before it encodes the next one.
    """
    buffer = bytearray() if buffer is None else buffer
    encoder.encode_into(message, buffer, LENGTH_BYTES)
    buffer[:LENGTH_BYTES] = (len(buffer) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
    return buffer


def receive(connection: socket.socket) -> ToWorker | None:
    """Return the next message; None when the other side has closed the connection."""
    length = _exactly(connection, LENGTH_BYTES)
    body = _exactly(connection, int.from_bytes(length, "little")) if length else None
    return None if body is None else to_worker.decode(body)


def _exactly(connection: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if received == 0:
            return None
        view = view[received:]
    return data
