"""Compare this server with the hosted design and with LitServe in latency, throughput and memory, on the same weights.

    python -m benchmarks.server [--cases tiny-64 tiny-256 demo-512] [--clients 1 4 16 64] [--seconds 2] [--save NAME]

Every server runs in its own process on 127.0.0.1, and closed-loop clients in this process send requests to it. A cell
of the table is measured in rounds, one server after the other, so that changes of the machine's speed affect all
servers alike. "bare" is a loop of decode and render in this process, without HTTP, in the same rounds. The status and
the length of every answer are checked, and one image of each cell is compared with the bare decode.

`--save NAME` also writes benchmarks/results/NAME.json, which `benchmarks.plot_server` draws.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import uvloop

from benchmarks.load import Tally, closed_loop
from benchmarks.peers import HOSTED, LIT, LIT_BATCHED, LIT_WORKERS, OURS, OURS_WORKERS, RAY, RAY_REPLICAS, Peer, running
from benchmarks.traffic import ANSWERS, CASES, Work, write_models
from server.config import load_settings
from server.inprocess.direct import Direct

RESULTS = Path(__file__).parent / "results"
BARE = "bare"


@dataclass(frozen=True)
class Row:
    """One cell of the table.

    ratio: the throughput relative to the bare loop. added_ms: the difference of the medians to the bare loop.
    """

    case: str
    answer: str
    server: str
    clients: int
    per_s: float
    ratio: float
    p50_ms: float
    p99_ms: float
    added_ms: float
    answers: int
    refused: int


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["tiny-64", "tiny-256", "demo-512"])
    parser.add_argument("--answers", nargs="+", choices=ANSWERS, default=list(ANSWERS))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    names = (OURS, HOSTED, LIT, LIT_BATCHED, LIT_WORKERS)
    on_ray = (OURS_WORKERS, RAY, RAY_REPLICAS)
    parser.add_argument("--servers", nargs="+", choices=(*names, *on_ray), default=list(names))
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each cell, for all rounds together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--save", default=None, metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended
    with tempfile.TemporaryDirectory() as folder:
        models_yaml = write_models(Path(folder))
        direct = Direct(load_settings(config=models_yaml))
        loaded = [direct.models.load(name).info for name in direct.settings.models]
        machine = machine_name(f"{loaded[0].dtype} {loaded[0].decoder} decoder")
        print(f"{machine}\n")
        with running(models_yaml, loaded[0].dtype, max(arguments.clients), arguments.servers) as peers:
            rows: list[Row] = []
            for case in arguments.cases:
                rows += measure_case(direct, peers, case, arguments)
                memory = {peer.name: {"rss": peer.rss_bytes(), "pss": peer.pss_bytes()} for peer in peers}
                save(arguments.save, machine, memory, rows)  # after each case, so that an aborted run keeps its results
    print_memory(memory)


def save(name: str | None, machine: str, memory: dict[str, dict[str, int]], rows: Sequence[Row]) -> None:
    """Write results/NAME.json, unless the name is None."""
    if name is None:
        return
    date, table = f"{datetime.now(UTC):%Y-%m-%d}", [asdict(row) for row in rows]
    saved = {"machine": machine, "date": date, "memory_bytes": memory, "rows": table}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(saved, indent=1) + "\n")


def measure_case(direct: Direct, peers: Sequence[Peer], case: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure all cells of a case, print them, and yield them."""
    counts = [count for count in arguments.clients if count <= CASES[case].most_clients]
    print_header(case, counts)
    for answer in arguments.answers:
        work = Work(direct, CASES[case], answer)
        cells = [measure(work, peers, count, arguments.seconds, arguments.rounds) for count in counts]
        rows = [row for count, cell in zip(counts, cells, strict=True) for row in rows_of(case, answer, count, cell)]
        print_answer(answer, counts, rows)
        yield from rows
    print()


Cell = dict[str, list[Tally]]  # the results of each server, one for each round


def measure(work: Work, peers: Sequence[Peer], clients: int, seconds: float, rounds: int) -> Cell:
    """Measure one cell, for all servers. Raises WrongAnswer."""
    cell: Cell = {name: [] for name in (BARE, *(peer.name for peer in peers))}
    lengths: dict[str, dict[int, int]] = {peer.name: {} for peer in peers}
    for _ in range(rounds):
        cell[BARE].append(bare_loop(work, seconds / rounds))
        for peer in peers:
            known = lengths[peer.name]

            def check(index: int, body: bytes, known: dict[int, int] = known) -> None:
                work.check_length(index, body, known)

            with peer.measured():
                tally = uvloop.run(closed_loop(peer.port, work.sent, clients, seconds / rounds, check))
            work.check_picture(*tally.last)
            cell[peer.name].append(tally)
    return cell


def bare_loop(work: Work, seconds: float) -> Tally:
    """Decode and render requests that have already been parsed, one after the other."""
    direct, tally = work.direct, Tally()
    direct.run(work.jobs[0])  # so that the threads are awake
    started, index = time.perf_counter(), 0
    while (sent := time.perf_counter()) < started + seconds:
        job = work.jobs[index % len(work.jobs)]
        direct.render(job, direct.run(job))
        tally.latencies_ms.append((time.perf_counter() - sent) * 1e3)
        index += 1
    tally.seconds = time.perf_counter() - started
    return tally


def rows_of(case: str, answer: str, clients: int, cell: Cell) -> Iterator[Row]:
    """Yield a row for each server of a cell."""
    bare_per_s, bare_ms = per_second(cell[BARE]), [statistics.median(tally.latencies_ms) for tally in cell[BARE]]
    for server, tallies in cell.items():
        latencies = sorted(latency for tally in tallies for latency in tally.latencies_ms)
        medians = [statistics.median(tally.latencies_ms) for tally in tallies]
        yield Row(
            case=case,
            answer=answer,
            server=server,
            clients=clients,
            per_s=per_second(tallies),
            ratio=per_second(tallies) / bare_per_s,
            p50_ms=statistics.median(latencies),
            p99_ms=latencies[math.ceil(0.99 * len(latencies)) - 1],
            added_ms=statistics.median(m - b for m, b in zip(medians, bare_ms, strict=True)),
            answers=len(latencies),
            refused=sum(tally.refused for tally in tallies),
        )


def per_second(tallies: Sequence[Tally]) -> float:
    """Return the answers per second of several rounds."""
    return sum(len(tally.latencies_ms) for tally in tallies) / sum(tally.seconds for tally in tallies)


def print_header(case: str, counts: Sequence[int]) -> None:
    """Print the header of a case's table. counts: the numbers of clients."""
    columns = " | ".join(f"{count} client{'s' if count > 1 else ''}" for count in counts)
    print(f"{case}: answers per second (relative to the bare loop), p50 / p99 in ms\n")
    print(f"| answer | server | added at 1 client, ms | {columns} | refused |")
    print("| --- " * (4 + len(counts)) + "|")


def print_answer(answer: str, counts: Sequence[int], rows: Sequence[Row]) -> None:
    """Print the rows of a kind of answer."""
    for server in dict.fromkeys(row.server for row in rows):
        own = [row for row in rows if row.server == server]
        added = "" if server == BARE or own[0].clients != 1 else f"{own[0].added_ms:.1f}"
        cells = [f"{row.per_s:.4g} ({row.ratio:.2f}), {row.p50_ms:.4g} / {row.p99_ms:.4g}" for row in own]
        refused = sum(row.refused for row in own)
        print(f"| {answer} | {server} | {added} | {' | '.join(cells)} | {refused} |", flush=True)


def print_memory(memory: dict[str, dict[str, int]]) -> None:
    """Print the memory of each server."""
    print("| server | memory of its processes, MB | with shared pages divided, MB |\n| --- | --- | --- |")
    for name, sizes in memory.items():
        print(f"| {name} | {sizes['rss'] / 1e6:.0f} | {sizes['pss'] / 1e6:.0f} |")


def machine_name(engine: str) -> str:
    """Return what the results depend on: the machine, the engine, and OpenMP's variables, which every server gets."""
    openmp = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_"))]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    facts = [f"{os.cpu_count()} cores", platform.machine(), f"torch {torch.__version__}", engine, *openmp]
    return f"{', '.join(facts)}, load {load} at the start"


if __name__ == "__main__":
    main()
