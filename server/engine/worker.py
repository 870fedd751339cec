"""The process that owns a device: reads requests from the front process, answers, ends with it. Knows no HTTP."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from server.config import Settings
from server.engine import messages
from server.engine.loader import choose_device
from server.engine.pipeline import is_out_of_memory
from server.engine.runner import Runner
from server.logs import write_logs
from server.types import Done, LoadedInfo

log = logging.getLogger(__name__)

LOST_DEVICE_STATUS = 70
HOUSEKEEPING_S = 1.0


def main(connection: socket.socket, settings: Settings) -> None:
    """Serve until the front process closes the connection."""
    # Whoever signals a process group means the front process: it drains, and then closes the connection.
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_IGN)
    write_logs(settings.options.log_level, settings.options.log_format)
    Worker(connection, settings).serve()
    logging.shutdown()
    os._exit(0)  # a decode may be running: nobody waits for it any more


class Worker:
    """One connection, one device."""

    def __init__(self, connection: socket.socket, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._sending = threading.Lock()
        if settings.options.threads is not None:
            torch.set_num_threads(settings.options.threads)
        self._runner = Runner(settings)
        # As many as there are models: one that waits for the hub keeps no other one waiting.
        self._files = ThreadPoolExecutor(len(settings.models), thread_name_prefix="files")
        self._batches: dict[int, BatchListener] = {}
        self._held: dict[str, LoadedInfo] = {}

    def serve(self) -> None:
        try:
            device = choose_device(self._settings.options.device)
        except ValueError as error:
            self.send(messages.Unusable(str(error)))
            return
        self.send(messages.Ready(str(device), torch.cuda.device_count() if device.type == "cuda" else 1))
        threading.Thread(target=self._keep_house, name="house", daemon=True).start()
        while (message := messages.receive(self._connection)) is not None:
            match message:
                case messages.Decode(batch, requests, is_short):
                    self._batches[batch] = BatchListener(self, batch, len(requests))
                    self._runner.submit(requests, self._batches[batch], is_short=is_short)
                case messages.Ping():
                    self.send(messages.Pong(self._runner.steps))
                case messages.Drop(batch, index):
                    if listener := self._batches.get(batch):  # it may end meanwhile
                        listener.dropped.add(index)
                case messages.Describe():
                    self._files.submit(self._describe, message)
                case messages.Load():
                    threading.Thread(target=self._load, args=(message,), name="load", daemon=True).start()

    def send(self, message: messages.FromWorker) -> None:
        with self._sending:
            try:
                self._connection.sendall(messages.encode(message))
            except OSError:
                os._exit(0)  # the front process is gone

    def forget(self, batch: int) -> None:
        self._batches.pop(batch, None)
        self.tell_models()

    def tell_models(self) -> None:
        """What is loaded, if that changed."""
        held = {name: info for name in self._settings.models if (info := self._runner.sync.loaded(name)) is not None}
        if held != self._held:
            self._held = held
            self.send(messages.Holds(held))

    def _describe(self, message: messages.Describe) -> None:
        try:
            info = self._runner.sync.describe(message.model, message.is_local_only)
            self.send(messages.Replied(message.call, info=info))
        except Exception as error:  # noqa: BLE001  # the border of a call: it is answered
            self.send(messages.Replied(message.call, failure=failure_of(error)))

    def _load(self, message: messages.Load) -> None:
        try:
            self._runner.sync.load(message.model, message.operation)
        except Exception as error:  # noqa: BLE001  # the border of a call: it is answered
            self.send(messages.Replied(message.call, failure=failure_of(error)))
        else:
            self.tell_models()
            self.send(messages.Replied(message.call))

    def _keep_house(self) -> None:
        while True:
            time.sleep(HOUSEKEEPING_S)
            if self._runner.sync.unload_idle():
                self.tell_models()


class BatchListener:
    """Tells the front process how a batch goes."""

    def __init__(self, worker: Worker, batch: int, size: int) -> None:
        self._worker = worker
        self._batch = batch
        self._open = size
        self._counting = threading.Lock()
        self.dropped: set[int] = set()

    def is_wanted(self, index: int) -> bool:
        return index not in self.dropped

    def started(self) -> None:
        self._worker.send(messages.Started(self._batch))

    def decoded(self) -> None:
        self._worker.tell_models()
        self._worker.send(messages.Decoded(self._batch))

    def done(self, index: int, done: Done) -> None:
        self._worker.send(messages.Answered(self._batch, index, done))
        self._close_one()

    def failed(self, index: int, error: Exception) -> None:
        if self.is_wanted(index):
            self._worker.send(messages.Failed(self._batch, index, failure_of(error)))
        self._close_one()

    def _close_one(self) -> None:
        with self._counting:
            self._open -= 1
            is_last = self._open == 0
        if is_last:
            self._worker.forget(self._batch)


def failure_of(error: Exception) -> messages.Failure:
    """A device that is lost stays lost in this process: end it, and the front process starts another."""
    if is_lost_device(error) or is_lost_device(error.__cause__):
        log.critical("the device is lost (%s); this worker ends and another one starts", type(error).__name__)
        logging.shutdown()
        os._exit(LOST_DEVICE_STATUS)
    return messages.Failure.of(error)


def is_lost_device(error: BaseException | None) -> bool:
    """CUDA's sticky errors: every later call of this process fails with them too. A lack of memory is none of them."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
