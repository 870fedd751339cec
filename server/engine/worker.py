"""The process that owns a device: receives requests from the front process, answers them, and ends with it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from ..config import Settings
from ..logs import write_logs
from ..model_info import LoadedInfo, ModelInfo
from ..values import RenderedResult
from ..workers import messages
from ..workers.starting import ASKS_NVML, UNUSABLE_FORK_STATUS
from .device_errors import is_lost_device
from .host import Host
from .weights.placement import choose_device

log = logging.getLogger(__name__)

LOST_DEVICE_STATUS = 70


def main(connection: socket.socket, settings: Settings) -> None:
    """Serve until the front process closes the connection."""
    # A signal to the process group is meant for the front process, which drains and then closes the connection.
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_IGN)
    write_logs(settings.options.log_level, settings.options.log_format)
    Worker(connection, settings).serve()
    logging.shutdown()
    os._exit(0)  # a decode may still be running, but no client waits for it any more


class Worker:
    """Serves one connection with one device."""

    def __init__(self, connection: socket.socket, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._sending = threading.Lock()
        self._buffer = bytearray()  # of the message that is being sent
        self._batches: dict[int, BatchListener] = {}
        self._held: dict[str, LoadedInfo] = {}
        self._host = Host(settings, on_unload=self.tell_models)

    def serve(self) -> None:
        """Receive messages until the front process closes the connection."""
        os.environ.pop(ASKS_NVML, None)
        if self._settings.options.device != "cpu" and torch.cuda._is_in_bad_fork() and has_cuda_driver():
            os._exit(UNUSABLE_FORK_STATUS)  # torch would find no CUDA device, or raise
        try:
            device = choose_device(self._settings.options.device)
        except ValueError as error:
            self.send(messages.Unusable(str(error)))
            return
        self._host.start()
        self.send(messages.Ready(str(device), torch.cuda.device_count() if device.type == "cuda" else 1))
        while (message := messages.receive(self._connection)) is not None:
            match message:
                case messages.Run(batch, requests, is_short):
                    self._batches[batch] = BatchListener(self, batch, len(requests))
                    self._host.run(requests, self._batches[batch], is_short=is_short)
                case messages.Ping():
                    self.send(messages.Pong(self._host.steps))
                case messages.Drop(batch, index):
                    if listener := self._batches.get(batch):  # the batch may have ended meanwhile
                        listener.dropped.add(index)
                case messages.Describe(call, model, is_local_only):
                    self._host.describe(model, is_local_only).add_done_callback(partial(self._reply_info, call))
                case messages.Load(call, coder):
                    self._host.load(coder).add_done_callback(partial(self._reply_loaded, call))

    def send(self, message: messages.FromWorker) -> None:
        """Send a message. If the front process is gone, this process ends."""
        with self._sending:
            try:
                self._connection.sendall(messages.encode(message, self._buffer))
            except OSError:
                os._exit(0)

    def forget(self, batch: int) -> None:
        """Forget a batch whose requests are all answered."""
        self._batches.pop(batch, None)
        self.tell_models()

    def tell_models(self) -> None:
        """Tell the front process what is loaded, if that has changed."""
        held = self._host.models.all_loaded()
        if held != self._held:
            self._held = held
            self.send(messages.Holds(held))

    def _reply_info(self, call: int, described: Future[ModelInfo]) -> None:
        self._reply(call, lambda: messages.Replied(call, info=described.result()))

    def _reply_loaded(self, call: int, loaded: Future[LoadedInfo]) -> None:
        def reply() -> messages.Replied:
            loaded.result()
            self.tell_models()
            return messages.Replied(call)

        self._reply(call, reply)

    def _reply(self, call: int, make: Callable[[], messages.Replied]) -> None:
        """Answer a call with a message, or with the error of making or sending it."""
        try:
            self.send(make())
        except Exception as error:  # noqa: BLE001  # the border of a call: it is answered
            self.send(messages.Replied(call, failure=failure_of(error)))


def has_cuda_driver() -> bool:
    """Return whether this machine has the driver of CUDA devices, without which there is none."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class BatchListener:
    """Tells the front process what happens to a batch."""

    def __init__(self, worker: Worker, batch: int, size: int) -> None:
        """batch: the number that the front process gave the batch. size: how many requests it has."""
        self._worker = worker
        self._batch = batch
        self._open = size
        self._counting = threading.Lock()
        self.dropped: set[int] = set()

    def is_wanted(self, index: int) -> bool:
        """Return whether the front process has not dropped this request."""
        return index not in self.dropped

    def started(self) -> None:
        """Tell the front process that the device has begun with the batch."""
        self._worker.send(messages.Started(self._batch))

    def progressed(self, index: int, frames: int) -> None:
        """Tell the front process how many frames of a video are done."""
        self._worker.send(messages.Progressed(self._batch, index, frames))

    def emitted(self, index: int, piece: bytes) -> None:
        """Send the next piece of a streamed answer, unless the request was dropped."""
        if self.is_wanted(index):
            self._worker.send(messages.Emitted(self._batch, index, piece))

    def computed(self) -> None:
        """Tell the front process that the batch no longer uses the device."""
        self._worker.tell_models()
        self._worker.send(messages.Computed(self._batch))

    def finished(self, index: int, result: RenderedResult) -> None:
        """Send the answer to a request."""
        self._worker.send(messages.Finished(self._batch, index, result))
        self._close_one()

    def failed(self, index: int, error: Exception) -> None:
        """Send the error of a request, unless the request was dropped."""
        if self.is_wanted(index):
            self._worker.send(messages.Failed(self._batch, index, failure_of(error)))
        self._close_one()

    def _close_one(self) -> None:
        with self._counting:
            self._open -= 1
            is_last = self._open == 0
        if is_last:
            self._worker.forget(self._batch)


def failure_of(error: BaseException) -> messages.Failure:
    """Return an error as a message. If the device is lost, end this process, and the front process starts another."""
    if is_lost_device(error) or is_lost_device(error.__cause__):
        log.critical("the device is lost (%s); this worker ends and another one starts", type(error).__name__)
        logging.shutdown()
        os._exit(LOST_DEVICE_STATUS)
    return messages.Failure.of(error)
