"""A worker process as an Engine: started, listened to, restarted when it ends. This side never imports torch."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import multiprocessing.forkserver as forkserver
import multiprocessing.resource_tracker as resource_tracker
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..config import Settings
from ..errors import ConfigError, ServerError, Unavailable
from ..metrics import Metrics
from ..model_info import CoderId, Direction, LoadedInfo, ModelInfo
from ..scheduling.engines import Batch, WorkerDied
from . import messages

log = logging.getLogger(__name__)

WORKER = f"{__package__.partition('.')[0]}.engine.worker"
READ_AHEAD_BYTES = 16 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0
CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
OOM_KILLS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))  # each has a line `oom_kill N`
DEATHS_AT_START = 3
CLOSE_S = 2.0
# A worker that says nothing for so many beats is stuck as a whole: stopped, swapped out, or one thread keeps all others
# from running. Python's own work never does for so long, even on a busy machine.
BEAT_S, BEATS_MISSED = 1.0, 15

# How often an OpenMP thread looks before it sleeps. libgomp's own 300,000 looks are some 10 ms: when another process
# takes a core, each parallel region of a decode waits as long for its preempted thread. On two cores a 512x512 decode
# of the demo takes 7 % longer alone with 8,000, and half as long beside a busy process.
SPIN_COUNT = "8000"

# Forked from a process that has imported torch and touched no device: a worker is there again within a second, and the
# libraries' memory is shared.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([WORKER])


def start_forkserver() -> None:
    """Start it on the main thread, ahead of the first worker, because its imports take seconds.

    Like its workers it takes no signals, because a signal to the process group is meant for the front process. A
    blocked signal stays blocked in a new process, and unlike an ignored one it is not lost in this process.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # libgomp reads it as it is loaded
    resource_tracker.ensure_running()  # else it is started in between, and unblocks them
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, usual)


class ProcessEngine:
    """One device, `device` as `--device` spells it."""

    def __init__(
        self,
        settings: Settings,
        device: str,
        metrics: Metrics,
        *,
        takes_any: bool = True,
        others: Sequence[str] = (),
        worker: str = WORKER,
    ) -> None:
        """takes_any: also models that name no device. others: devices that need an engine unless this one is theirs.

        worker: the module whose `main` is the process.
        """
        self.device = device  # what it turns out to be, once started
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
        self.steps = 0  # of work that the worker has begun
        self._has_answered = False  # whether this worker ever did: if not, the next one starts later
        self._ended_because: str | None = None  # why this side ended the worker
        self._beats_missed = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self, changed: Callable[[], None]) -> Sequence[ProcessEngine]:
        """Raises ConfigError when there is no such device, or the process ends again and again before it is ready."""
        self._changed = changed
        self._first = asyncio.get_running_loop().create_future()
        self._metrics.watch_worker(self.device, lambda: self.pid)
        self._supervising = asyncio.create_task(self._supervise())
        takes_all = self.device in ("auto", "cuda")
        await self._first
        further = [f"cuda:{index}" for index in range(1, self._devices)] if takes_all else []
        pinned = [device for device in self._others if device not in (self.device, *further)]
        return [
            ProcessEngine(self._settings, device, self._metrics, takes_any=device in further, worker=self._worker)
            for device in (*further, *pinned)
        ]

    def can_run(self, model: str) -> bool:
        wanted = self._settings.models[model].device
        if wanted in (None, "auto"):
            return self._takes_any
        return full_name(wanted) == full_name(self.device)

    def loaded(self, model: str) -> LoadedInfo | None:
        return self._held.get(model)

    async def describe(self, model: str, *, is_local_only: bool = False) -> ModelInfo:
        info = await self._call(lambda call: messages.Describe(call, model, is_local_only))
        assert info is not None
        return info

    async def load(self, coder: CoderId) -> None:
        await self._call(lambda call: messages.Load(call, coder))

    async def run(self, batch: Batch) -> None:
        number, ended = next(self._ids), asyncio.get_running_loop().create_future()
        self._batches[number] = batch, ended
        for index, pending in enumerate(batch.members):
            pending.answer.add_done_callback(partial(self._after, number, index))
        try:
            await self._send(messages.Run(number, [pending.request for pending in batch.members], batch.is_short))
            await ended
        finally:
            del self._batches[number]
            ended.cancel()  # where sending failed, nobody waits for it
            if not ended.cancelled():
                ended.exception()

    def kill(self, reason: str) -> None:
        if self._process:
            self._ended_because = reason
            self._process.kill()

    async def close(self) -> None:
        """The worker ends when its connection does."""
        tasks = [task for task in (self._supervising, self._restoring) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._process:
            await asyncio.to_thread(self._process.join, CLOSE_S)
            self._process.kill()
            await asyncio.to_thread(self._process.join)

    def _after(self, number: int, index: int, answer: asyncio.Future[Any]) -> None:
        """A client has its answer, or left."""
        if number not in self._batches:
            return
        if answer.cancelled() and self._writer:
            self._writer.write(messages.encode(messages.Drop(number, index)))
        self._end_if_done(number)

    def _end_if_done(self, number: int) -> None:
        batch, ended = self._batches[number]
        if batch.computed.done() and all(pending.answer.done() for pending in batch.members) and not ended.done():
            ended.set_result(None)

    async def _call(self, make: Callable[[int], messages.ToWorker]) -> ModelInfo | None:
        number = next(self._ids)
        reply: asyncio.Future[ModelInfo | None] = asyncio.get_running_loop().create_future()
        self._calls[number] = reply
        try:
            await self._send(make(number))
            return await reply
        except WorkerDied:
            raise Unavailable("the worker of this device is restarting; try again in a few seconds") from None
        finally:
            del self._calls[number]

    async def _send(self, message: messages.ToWorker) -> None:
        if self._writer is None:
            raise WorkerDied
        self._writer.write(messages.encode(message))
        try:
            await self._writer.drain()
        except ConnectionError:
            raise WorkerDied from None

    async def _supervise(self) -> None:
        """One worker after another."""
        deaths = 0
        while True:
            self._has_answered, self._ended_because = False, None
            oom_kills = count_oom_kills()
            try:
                await self._live()
            except Exception:  # the border of a worker: whatever it was, another one is tried
                log.exception("the worker of %s could not be started or understood", self.device)
            finally:
                self._bury()
            deaths = 0 if self._has_answered else deaths + 1
            assert self._first is not None
            if self._first.done() and self._first.exception():  # there is no such device
                return
            if deaths >= DEATHS_AT_START and not self._first.done():
                self._first.set_exception(ConfigError("the worker process ends as it starts; the log above says why"))
                return
            self._metrics.worker_restarts.labels(await self._cause(oom_kills)).inc()
            await asyncio.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**deaths))

    async def _live(self) -> None:
        """From start to end of one worker."""
        ours, theirs = socket.socketpair()
        arguments = theirs, self._settings, self._worker
        process = processes.Process(target=run_worker, args=arguments, name=f"worker-{self.device}", daemon=True)
        try:
            with theirs:
                await asyncio.to_thread(process.start)
        except BaseException:  # cancelled: a worker that starts all the same finds its connection closed
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
        """Read a message in pieces: a worker that sends a large answer responds all the while."""
        body = bytearray()
        while len(body) < length:
            piece = await reader.read(min(READ_AHEAD_BYTES, length - len(body)))
            if not piece:
                raise asyncio.IncompleteReadError(b"", length)
            body += piece
            self._beats_missed = 0
        return body

    async def _beat(self) -> None:
        """Ask the worker again and again whether it responds, and end it when it does not.

        Beats are counted, not seconds: while this process itself does not run, none is missed.
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
        self.is_alive, self.device, self._devices = True, full_name(device), devices
        assert self._first is not None
        assert self._writer is not None
        if not self._first.done():
            self._first.set_result(None)
        if self._wanted:
            self._restoring = asyncio.create_task(self._restore())
        self._changed()

    async def _restore(self) -> None:
        """What the last worker held, one after the other; what ends the worker is not tried again."""
        while self._wanted:
            with suppress(ServerError):
                await self.load(self._wanted.pop())

    def _hear_of_batch(
        self, message: messages.Started | messages.Computed | messages.Finished | messages.Failed
    ) -> None:
        if message.batch not in self._batches:
            return
        batch, _ = self._batches[message.batch]
        match message:
            case messages.Started():
                batch.note_started()
            case messages.Computed():
                batch.note_computed()
                self._end_if_done(message.batch)
            case messages.Finished(_, index, result):
                self._has_answered = True
                batch.members[index].finish(result)
            case messages.Failed(_, index, failure):
                batch.members[index].fail(failure.error())

    def _bury(self) -> None:
        """Whoever waits for this worker is told."""
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
        """Log how the last worker ended; the result labels a metric. oom_kills: the count from before it started."""
        if self._process is None:
            return "not_started"
        await asyncio.to_thread(self._process.join, CLOSE_S)
        if self._process.exitcode is None:  # it closed its connection and hangs
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        code = self._process.exitcode or 0
        how = self._ended_because or how_it_ended(code, count_oom_kills() > oom_kills)
        log.error("worker %d of %s ended: %s; another one starts", self._process.pid, self.device, how)
        return f"signal_{-code}" if code < 0 else f"exit_{code}"


def how_it_ended(code: int, was_out_of_memory: bool) -> str:
    """Say in words how a process ended. code: its exit code, negative for a signal."""
    if code == -signal.SIGKILL and was_out_of_memory:
        return "the kernel killed it because memory ran out; lower memory_budget_mb or max_pixels"
    if code == -signal.SIGKILL:
        return "another process killed it (signal 9)"
    if code < 0:
        return f"it crashed ({signal.strsignal(-code)}, signal {-code})"
    return f"it exited with status {code}"


def count_oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory, in this container or on this machine."""
    for path in OOM_KILLS:
        with suppress(OSError, ValueError, KeyError):
            counts = dict(line.split() for line in path.read_text().splitlines())
            return int(counts["oom_kill"])
    return 0


def run_worker(connection: socket.socket, settings: Settings, module: str) -> None:
    """In the new process."""
    import_module(module).main(connection, settings)


def full_name(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def threads_for(devices: Sequence[str]) -> int | None:
    """Of each worker: its share of the cores, None where torch's own choice is right.

    A container's limit on CPU time counts too, which torch does not know of.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = allowed
    with suppress(OSError, ValueError):  # ValueError: "max"
        quota, period = map(int, CGROUP_LIMIT.read_text().split())
        cores = min(allowed, round(quota / period))
    threads = max(1, cores // max(1, sum(device in ("auto", "cpu") for device in devices)))
    return threads if threads < allowed else None


def engines_for(settings: Settings, metrics: Metrics) -> list[ProcessEngine]:
    """One for each device of `--device`; once it is known what `auto` means, the first adds those that models name."""
    shared = settings.options.device.split(",")
    own = {entry.device for entry in settings.models.values() if entry.device not in (None, "auto")}
    others = sorted({full_name(device) for device in own if device} - {full_name(device) for device in shared})
    on_cpu = shared if "auto" in shared else [*shared, *others]  # auto may well be the CPU that a model names
    threads = settings.options.threads or threads_for(on_cpu)
    settings = settings.model_copy(update={"options": settings.options.model_copy(update={"threads": threads})})
    first, *rest = shared
    return [
        ProcessEngine(settings, first, metrics, others=others),
        *(ProcessEngine(settings, device, metrics) for device in rest),
    ]
