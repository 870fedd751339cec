"""The messages between the front process and a worker: what one side encodes, the other reads."""

from __future__ import annotations

import socket
import threading

import pytest

from server import errors
from server.engine.coders.interface import Stopped
from server.engine.models import NotLoaded
from server.engine.pipeline import NonFiniteOutput
from server.model_info import CoderId, Direction
from server.values import Geometry, Request
from server.workers import messages
from server.workers.messages import Failure
from tests.requests import decode_job


def request(side: int) -> Request:
    seed = ("seed", 2**64 - 1), ("timestep", 0.5)  # a float would lose digits of the seed
    size = Geometry((1, 4, side, side), is_packed=False, num_frames=1, height=8, width=8, arguments=seed)
    job = decode_job("sd", size)
    return Request(job, memoryview(bytes(range(256)) * (job.bytes_needed // 256)))


def test_messages_of_any_size_arrive_in_order_from_one_buffer() -> None:
    """Also where a small one follows a large one in the same buffer."""
    ours, theirs = socket.socketpair()
    sent = [
        messages.Run(1, [request(8)]),
        messages.Run(2, [request(256), request(8)], is_short=True),
        messages.Drop(2, 1),
        messages.Load(3, CoderId("sd", Direction.ENCODE)),
        messages.Run(4, [request(64)]),
    ]
    buffer = bytearray()

    def send() -> None:
        for message in sent:
            ours.sendall(messages.encode(message, buffer))
        ours.close()

    sending = threading.Thread(target=send)
    sending.start()
    received = []
    while (message := messages.receive(theirs)) is not None:
        received.append(message)
    sending.join()
    theirs.close()
    assert received == sent


def errors_of_clients() -> list[errors.ServerError]:
    found = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.ServerError)]
    needs = {
        errors.QueueFull: ("full", 3),
        errors.DeadlinePassed: ("late", 9),
        errors.NotDone: ("not done", 1),
        errors.ModelUnavailable: ("sd", "lost", 7),
    }
    return [each(*needs.get(each, ("a sentence",))) for each in found]


@pytest.mark.parametrize("error", errors_of_clients(), ids=lambda error: type(error).__name__)
def test_every_error_crosses_with_its_class_its_words_and_its_patience(error: errors.ServerError) -> None:
    crossed = Failure.of(error).error()
    assert (type(crossed), str(crossed), crossed.retry_after_s) == (type(error), str(error), error.retry_after_s)
    assert crossed.told(to_operator=True) == error.told(to_operator=True)


@pytest.mark.parametrize("error", [Stopped(), NotLoaded(), NonFiniteOutput(), ZeroDivisionError("/secret")])
def test_an_error_that_no_client_knows_crosses_as_a_failure_of_the_server(error: Exception) -> None:
    crossed = Failure.of(error).error()
    assert (type(crossed), "secret" in str(crossed)) == (errors.ServerError, False)
