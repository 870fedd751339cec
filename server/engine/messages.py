"""What the front process and a worker say to each other: length-prefixed MessagePack of plain data, never a pickle."""

from __future__ import annotations

import socket

import msgspec

from server import errors
from server.types import Done, LoadedInfo, ModelInfo, Operation, VAERequest

LENGTH_BYTES = 8


class Decode(msgspec.Struct, tag=True, frozen=True):
    """Decodes or encodes of one key. is_short: they may run between the steps of longer work."""

    batch: int
    requests: list[VAERequest]
    is_short: bool = False


class Drop(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for this request any more."""

    batch: int
    index: int


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Asks whether the worker still responds."""


class Pong(msgspec.Struct, tag=True, frozen=True):
    """steps: how many steps of work have begun on the device since the worker started."""

    steps: int


class Describe(msgspec.Struct, tag=True, frozen=True):
    call: int
    model: str
    is_local_only: bool


class Load(msgspec.Struct, tag=True, frozen=True):
    call: int
    model: str
    operation: Operation


class Failure(msgspec.Struct, frozen=True):
    """An error across the border: ours by its class and words, any other as a bug."""

    kind: str
    words: tuple[str, ...]
    retry_after_s: int | None = None

    @staticmethod
    def of(error: Exception) -> Failure:
        if isinstance(error, errors.ModelUnavailable):
            return Failure("ModelUnavailable", (error.model, error.detail), error.retry_after_s)
        if isinstance(error, errors.ServerError):
            return Failure(type(error).__name__, tuple(map(str, error.args)), error.retry_after_s)
        return Failure("ServerError", ())

    def error(self) -> errors.ServerError:
        found: errors.ServerError = getattr(errors, self.kind)(*self.words)
        found.retry_after_s = self.retry_after_s
        return found


class Ready(msgspec.Struct, tag=True, frozen=True):
    device: str  # what was asked for, as torch names it
    devices: int  # of the kind that was asked for, on this machine


class Unusable(msgspec.Struct, tag=True, frozen=True):
    """There is no such device."""

    sentence: str


class Started(msgspec.Struct, tag=True, frozen=True):
    batch: int


class Decoded(msgspec.Struct, tag=True, frozen=True):
    batch: int


class Answered(msgspec.Struct, tag=True, frozen=True):
    batch: int
    index: int
    done: Done


class Failed(msgspec.Struct, tag=True, frozen=True):
    batch: int
    index: int
    failure: Failure


class Replied(msgspec.Struct, tag=True, frozen=True):
    """To Describe and Load."""

    call: int
    info: ModelInfo | None = None
    failure: Failure | None = None


class Holds(msgspec.Struct, tag=True, frozen=True):
    """The models whose weights are on the device, whenever that changed."""

    models: dict[str, LoadedInfo]


ToWorker = Decode | Drop | Ping | Describe | Load
FromWorker = Pong | Ready | Unusable | Started | Decoded | Answered | Failed | Replied | Holds

to_worker = msgspec.msgpack.Decoder(ToWorker)
from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def receive(connection: socket.socket) -> ToWorker | None:
    """The next message, None when the other side is gone."""
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
