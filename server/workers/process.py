"""A worker process as an Engine: start it, listen to it, and restart it when it ends.

This is the front process's side, which never imports torch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from ..config import Settings
from ..errors import ConfigError, ServerError, Unavailable
from ..metrics import Metrics
from ..model_info import CoderId, Direction, LoadedInfo, ModelInfo
from ..scheduling.engines import Batch, WorkerDied
from . import messages
from .endings import count_oom_kills, how_it_ended
from .starting import FORKED, SPAWNED, UNUSABLE_FORK_STATUS, WORKER, start_process

log = logging.getLogger(__name__)

READ_AHEAD_BYTES = 16 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0  # before a restart; the pause doubles with each worker that answers nothing
DEATHS_AT_START = 3  # the number of workers in a row that may end before the first one is ready
CLOSE_S = 2.0  # the time that a worker has to end by itself, before it is killed
# A worker that misses this many pings is stuck: it is stopped or swapped out, or one thread blocks all others. Python
# code never blocks the other threads for so long, even on a busy machine.
BEAT_S, BEATS_MISSED = 1.0, 15


class ProcessEngine:
    """One device, whose work is done in a worker process. The public methods are described in `Engine`.

    device: the name of the device as `--device` spells it; once the worker has started, as torch names it.
    is_alive: a worker is ready.
    steps: how many steps of work the worker has begun.
    """

    def __init__(
        self,
        settings: Settings,
        device: str,
        metrics: Metrics,
        *,
        takes_any: bool = True,
        others: Sequence[str] = (),
        worker: str = WORKER,
        processes: BaseContext = FORKED,
    ) -> None:
        """Make an engine that has not started.

        settings: the configuration of the server.
        device: a device of `--device`.
        metrics: count the restarts and the memory of the worker.
        takes_any: whether it also runs models that name no device.
        others: devices that models name but `--device` does not. `start` returns an engine for each that is not this
            device.
        worker: the name of the module whose `main` the process runs.
        processes: the context of multiprocessing by which the first worker is started (fork server or spawn).
        """
        self.device = device
        self.is_alive = False
        self._devices = 1
        options = settings.options.model_copy(update={"device": device, "api_key": None})
        self._settings = settings.model_copy(update={"options": options, "api_keys": ()})
        self._metrics = metrics
        self._takes_any = takes_any
        self._others = others
        self._worker = worker
        self._changed: Callable[[], None] = lambda: None
        self._ids = itertools.count()
        self._process: BaseProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._held: dict[str, LoadedInfo] = {}
        self._wanted: set[CoderId] = set()
        self._batches: dict[int, tuple[Batch, asyncio.Future[None]]] = {}
        self._calls: dict[int, asyncio.Future[ModelInfo | None]] = {}
        self._supervising: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None
        self._restoring: asyncio.Task[None] | None = None
        self.steps = 0
        self._has_answered = False  # whether the current worker has answered a request; if not, the pauses get longer
        self._ended_because: str | None = None  # why this process killed the worker
        self._beats_missed = 0
        self._processes = processes

    @property
    def pid(self) -> int | None:
        """The id of the worker process; None before the first one."""
        return self._process.pid if self._process else None

    async def start(self, changed: Callable[[], None]) -> Sequence[ProcessEngine]:
        """Start the worker, and return engines, not started, for further devices.

        These are the other CUDA devices if the device is auto or cuda, and those that models name. changed: called
        whenever `is_alive` or the loaded models have changed.

        Raises ConfigError if the device does not exist, or if DEATHS_AT_START workers in a row end before one is ready.
        """
        self._changed = changed
        self._first = asyncio.get_running_loop().create_future()
        self._metrics.watch_worker(self.device, lambda: self.pid)
        self._supervising = asyncio.create_task(self._supervise())
        takes_all = self.device in ("auto", "cuda")
        await self._first
        further = [f"cuda:{index}" for index in range(1, self._devices)] if takes_all else []
        pinned = [device for device in self._others if device not in (self.device, *further)]
        return [
            ProcessEngine(
                self._settings,
                device,
                self._metrics,
                takes_any=device in further,
                worker=self._worker,
                processes=self._processes,
            )
            for device in (*further, *pinned)
        ]

    def can_run(self, model: str) -> bool:
        """Return whether the model may run on this device."""
        wanted = self._settings.models[model].device
        if wanted in (None, "auto"):
            return self._takes_any
        return full_name(wanted) == full_name(self.device)

    def loaded(self, model: str) -> LoadedInfo | None:
        """Return what is known of a loaded model; None if no direction of it is loaded."""
        return self._held.get(model)

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        """Have the worker read a model's config.json. Raises ModelUnavailable; Unavailable if the worker ends."""
        info = await self._call(lambda call: messages.Describe(call, model, is_local_only))
        assert info is not None
        return info

    async def load(self, coder: CoderId) -> None:
        """Have the worker load a coder. Raises ModelUnavailable; Unavailable if the worker ends."""
        await self._call(lambda call: messages.Load(call, coder))

    async def run(self, batch: Batch) -> None:
        """Have the worker compute and render a batch, and answer its requests. Raises WorkerDied."""
        number, ended = next(self._ids), asyncio.get_running_loop().create_future()
        self._batches[number] = batch, ended
        for index, pending in enumerate(batch.members):
            pending.answer.add_done_callback(partial(self._after, number, index))
        try:
            await self._send(messages.Run(number, [pending.request for pending in batch.members], batch.is_short))
            await ended
        finally:
            del self._batches[number]
            ended.cancel()  # if sending failed, nothing awaits it
            if not ended.cancelled():
                ended.exception()

    def kill(self, reason: str) -> None:
        """Kill the worker; another one is started. reason: for the log."""
        if self._process:
            self._ended_because = reason
            self._process.kill()

    async def close(self) -> None:
        """Close the connection to the worker, which makes it end, and kill it if it does not end within CLOSE_S."""
        tasks = [task for task in (self._supervising, self._restoring) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._process:
            await asyncio.to_thread(self._process.join, CLOSE_S)
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def _after(self, number: int, index: int, answer: asyncio.Future[Any]) -> None:
        """Tell the worker if the client of a request has left. Called when a request has its answer or is cancelled."""
        if number not in self._batches:
            return
        if answer.cancelled() and self._writer:
            self._writer.write(messages.encode(messages.Drop(number, index)))
        self._end_if_done(number)

    def _end_if_done(self, number: int) -> None:
        """End `run` of a batch if the device is free and all requests have their answers."""
        batch, ended = self._batches[number]
        if batch.computed.done() and all(pending.answer.done() for pending in batch.members) and not ended.done():
            ended.set_result(None)

    async def _call(self, make: Callable[[int], messages.ToWorker]) -> ModelInfo | None:
        """Send a Describe or a Load, and return what the worker replies. make: makes the message from its number."""
        number = next(self._ids)
        reply: asyncio.Future[ModelInfo | None] = asyncio.get_running_loop().create_future()
        self._calls[number] = reply
        try:
            await self._send(make(number))
            return await reply
        except WorkerDied:
            raise Unavailable("a worker of this server is restarting; try again in a few seconds") from None
        finally:
            del self._calls[number]

    async def _send(self, message: messages.ToWorker) -> None:
        """Send a message to the worker. Raises WorkerDied if there is none."""
        if self._writer is None:
            raise WorkerDied
        self._writer.write(messages.encode(message))
        try:
            await self._writer.drain()
        except ConnectionError:
            raise WorkerDied from None

    async def _supervise(self) -> None:
        """Run one worker after another, until the engine is closed or cannot start."""
        deaths = 0
        while True:
            self._has_answered, self._ended_because = False, None
            oom_kills = count_oom_kills()
            try:
                await self._live()
            except Exception:  # whatever a worker does, another one must be tried
                log.exception("the worker of %s could not be started, or sent something unexpected", self.device)
            finally:
                self._bury()
            if self._processes is FORKED and await self._exit_code() == UNUSABLE_FORK_STATUS:
                log.info("CUDA is unusable in forked processes here, so the workers of %s start slower", self.device)
                self._processes = SPAWNED
                continue
            deaths = 0 if self._has_answered else deaths + 1
            assert self._first is not None
            if self._first.done() and self._first.exception():  # the device does not exist
                return
            if deaths >= DEATHS_AT_START and not self._first.done():
                self._first.set_exception(
                    ConfigError(f"the worker process ended {deaths} times while it started; the log above says why")
                )
                return
            self._metrics.worker_restarts.labels(await self._cause(oom_kills)).inc()
            await asyncio.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**deaths))

    async def _live(self) -> None:
        """Start one worker and handle its messages until it ends."""
        ours, theirs = socket.socketpair()
        arguments = theirs, self._settings, self._worker
        name = f"worker-{self.device}"
        new_process = self._processes.Process  # type: ignore[attr-defined]  # each context has one, BaseContext has none
        process = new_process(target=run_worker, args=arguments, name=name, daemon=True)
        try:
            with theirs:
                await asyncio.to_thread(start_process, process)
        except BaseException:  # when this is cancelled, the worker may still start; it then finds its connection closed
            ours.close()
            raise
        self._process = process
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=READ_AHEAD_BYTES)
        beating = asyncio.create_task(self._beat())
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(messages.LENGTH_BYTES), "little")
                self._hear(messages.from_worker.decode(await self._read(reader, length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            beating.cancel()

    async def _read(self, reader: asyncio.StreamReader, length: int) -> bytearray:
        """Read a message in pieces, so that a worker that is sending a large answer counts as responding."""
        body = bytearray()
        while len(body) < length:
            piece = await reader.read(min(READ_AHEAD_BYTES, length - len(body)))
            if not piece:
                raise asyncio.IncompleteReadError(b"", length)
            body += piece
            self._beats_missed = 0
        return body

    async def _beat(self) -> None:
        """Ping the worker every BEAT_S, and kill it when it has missed BEATS_MISSED beats.

        Beats are counted instead of seconds, so that the worker is not killed because this process itself was stopped.
        """
        self._beats_missed = 0
        while True:
            await asyncio.sleep(BEAT_S)
            if not self.is_alive or self._writer is None:
                continue
            self._beats_missed += 1
            if self._beats_missed > BEATS_MISSED:
                self.kill(f"it did not respond for {BEATS_MISSED * BEAT_S:g} s")
                return
            self._writer.write(messages.encode(messages.Ping()))

    def _hear(self, message: messages.FromWorker) -> None:
        """Handle a message from the worker."""
        match message:
            case messages.Pong(steps):
                self.steps = steps
            case messages.Ready(device, devices):
                self._be_ready(device, devices)
            case messages.Unusable(sentence):
                assert self._first is not None
                if not self._first.done():
                    self._first.set_exception(ConfigError(sentence))
            case messages.Holds(models):
                self._held = models
                self._changed()
            case messages.Replied(call, info, failure):
                reply = self._calls.get(call)
                if reply and not reply.done():
                    reply.set_exception(failure.error()) if failure else reply.set_result(info)
            case _:
                self._hear_of_batch(message)

    def _be_ready(self, device: str, devices: int) -> None:
        """Note that the worker has started, and load what the last one had loaded."""
        self.is_alive, self.device, self._devices = True, full_name(device), devices
        assert self._first is not None
        assert self._writer is not None
        if not self._first.done():
            self._first.set_result(None)
        if self._wanted:
            self._restoring = asyncio.create_task(self._restore())
        self._changed()

    async def _restore(self) -> None:
        """Load what the last worker had loaded, one after the other. A load that kills the worker is not repeated."""
        while self._wanted:
            with suppress(ServerError):
                await self.load(self._wanted.pop())

    def _hear_of_batch(
        self,
        message: messages.Started
        | messages.Progressed
        | messages.Emitted
        | messages.Computed
        | messages.Finished
        | messages.Failed,
    ) -> None:
        if message.batch not in self._batches:
            return
        batch, _ = self._batches[message.batch]
        match message:
            case messages.Started():
                batch.note_started()
            case messages.Progressed(_, index, frames):
                batch.members[index].frames_done = frames
            case messages.Emitted(_, index, piece):
                batch.members[index].emit(piece)
            case messages.Computed():
                batch.note_computed()
                self._end_if_done(message.batch)
            case messages.Finished(_, index, result):
                self._has_answered = True
                batch.members[index].finish(result)
            case messages.Failed(_, index, failure):
                batch.members[index].fail(failure.error())

    def _bury(self) -> None:
        """Clear the state of a worker that has ended, and raise WorkerDied in everything that waits for it."""
        self._wanted |= {
            CoderId(name, direction)
            for name, info in self._held.items()
            for direction in Direction
            if info.runs(direction)
        }
        self.is_alive, self._held = False, {}
        if self._writer:
            self._writer.close()
            self._writer = None
        waiting = [ended for _, ended in self._batches.values()] + list(self._calls.values())
        for future in waiting:
            if not future.done():
                future.set_exception(WorkerDied())
        self._changed()

    async def _cause(self, oom_kills: int) -> str:
        """Log how the last worker ended, and return it as the label of a metric.

        oom_kills: what `count_oom_kills` returned before the worker started.
        """
        code = await self._exit_code()
        if self._process is None or code is None:
            return "not_started"
        how = self._ended_because or how_it_ended(code, count_oom_kills() > oom_kills)
        log.error("worker %d of %s ended: %s; another one is started", self._process.pid, self.device, how)
        return f"signal_{-code}" if code < 0 else f"exit_{code}"

    async def _exit_code(self) -> int | None:
        """Wait until the last worker has ended, and return its exit code. Returns None if none was started."""
        if self._process is None:
            return None
        await asyncio.to_thread(self._process.join, CLOSE_S)
        if self._process.exitcode is None:  # it closed its connection and hangs
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        return self._process.exitcode


def run_worker(connection: socket.socket, settings: Settings, module: str) -> None:
    """Run a worker; called in the new process. connection: to the front process. module: the module of its `main`."""
    import_module(module).main(connection, settings)


def full_name(device: str) -> str:
    """Return the name of a device with its number: "cuda" means "cuda:0"."""
    return "cuda:0" if device == "cuda" else device
