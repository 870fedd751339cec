"""The queue on a virtual clock: order, batches, deadlines, fairness. Every ticket leaves it exactly once."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.scheduling.fair_queue import Queue, Ticket


def ticket(**changes: object) -> Ticket:
    usual = {
        "coder": "sd",
        "key": "sd",
        "pixels": 1,
        "seconds": 1.0,
        "arrived": 0.0,
        "deadline": 300.0,
    }
    return Ticket(**{**usual, **changes})


def anything(_: str) -> bool:
    return True


def test_tickets_alike_go_together_within_the_pixels_and_the_count() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=3, max_batch=16)
    for arrived in range(5):
        queue.put(ticket(arrived=arrived))
    queue.put(ticket(arrived=0.5, key="other"))
    assert [t.arrived for t in queue.take(anything)] == [0, 1, 2]
    assert [t.arrived for t in queue.take(anything)] == [3, 4]
    assert [t.key for t in queue.take(anything)] == ["other"]
    assert queue.take(anything) == []


def test_a_ticket_over_the_pixels_goes_alone_and_one_under_suspicion_too() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=3, max_batch=16)
    for arrived, changes in enumerate([{"pixels": 9}, {"pixels": 9}, {"is_alone": True}, {}, {}]):
        queue.put(ticket(arrived=arrived, **changes))
    assert [len(queue.take(anything)) for _ in range(4)] == [1, 1, 1, 2]


def test_only_short_work_that_cannot_grow_goes_ahead_of_its_time() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=3, max_batch=16)
    for count, size in ((1, 0), (2, 0), (3, 3)):
        queue.put(ticket(arrived=count))
        assert len(queue.take(anything, ahead_of_time_s=5)) == size
    queue.put(ticket(pixels=2))
    assert queue.take(anything, ahead_of_time_s=0.5) == []
    assert len(queue.take(anything, ahead_of_time_s=5)) == 1


def test_a_device_takes_only_the_models_that_it_runs() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=3, max_batch=16)
    queue.put(ticket(coder="flux", key="flux"))
    queue.put(ticket(arrived=5))
    assert [t.coder for t in queue.take(lambda model: model == "sd")] == ["sd"]
    assert queue.take(lambda model: model == "sd") == []


def test_who_waits_past_the_deadline_never_starts() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=3, max_batch=16)
    late, early = ticket(deadline=10), ticket(deadline=20)
    queue.put(late)
    queue.put(early)
    assert queue.expire(now=10) == [late]
    assert queue.take(anything) == [early]


def simulate(queue: Queue[Ticket], arrivals: list[Ticket], watch: Callable[[Ticket, float], None]) -> None:
    """Simulate one device on a virtual clock. watch: called with each ticket and the time at which it started."""
    coming = [(t.arrived, i, t) for i, t in enumerate(arrivals)]
    heapq.heapify(coming)
    now = 0.0
    while coming or len(queue):
        while coming and coming[0][0] <= now:
            queue.put(heapq.heappop(coming)[2])
        batch = queue.take(anything)
        if not batch:
            now = coming[0][0]
            continue
        for started in batch:
            watch(started, now)
        now += sum(t.seconds for t in batch)


def test_a_picture_waits_for_the_video_that_runs_and_not_for_those_that_wait() -> None:
    videos = [ticket(key="video", pixels=99, seconds=30.0, arrived=0.1 * i) for i in range(4)]
    images = [ticket(seconds=0.5, arrived=2.0 * i) for i in range(100)]
    waited: dict[str, list[float]] = {"sd": [], "video": []}
    simulate(Queue(2, 16), videos + images, lambda t, now: waited[str(t.key)].append(now - t.arrived))
    # An image waits for the running video, 30 s, and for the 15 images that arrived meanwhile. In the order of arrival,
    # the first image would have waited for all four videos.
    assert max(waited["sd"]) <= 30 + 15 * 0.5
    assert max(waited["video"]) <= 3 * 30 / 0.75 + 0.5  # images take a quarter of the time


def test_tickets_that_left_cost_their_flow_nothing() -> None:
    queue: Queue[Ticket] = Queue(2, 16)
    for gone in [ticket(key="video", pixels=99, seconds=60.0) for _ in range(15)]:
        queue.put(gone)
        queue.remove(gone)
    queue.put(ticket(seconds=0.5))
    queue.put(ticket(key="video", pixels=99, seconds=60.0, arrived=1))
    queue.put(ticket(seconds=0.5, arrived=2))
    assert [queue.take(anything)[0].key for _ in range(2)] == ["sd", "video"]


def test_pictures_each_of_a_size_of_its_own_do_not_starve_a_video() -> None:
    images = [ticket(key=i, pixels=1000 + i, seconds=0.5, arrived=0.25 * i) for i in range(800)]
    videos = [ticket(key="video", pixels=10**6, seconds=30.0, arrived=10.0) for _ in range(2)]
    started: list[float] = []
    simulate(Queue(2, 16), [*images, *videos], lambda t, now: started.append(now) if t.key == "video" else None)
    assert started[1] - started[0] <= 60 + 1


def test_a_video_gets_its_share_however_many_pictures_come() -> None:
    images = [ticket(seconds=0.5, arrived=0.25 * i) for i in range(800)]  # twice what the device can do
    video, started = ticket(key="video", pixels=99, seconds=30.0, arrived=10.0), []
    second = ticket(key="video", pixels=99, seconds=30.0, arrived=10.0)
    simulate(Queue(2, 16), [*images, video, second], lambda t, now: started.append(now) if t.key == "video" else None)
    assert started[0] - video.arrived <= 1.0
    assert 60 - 1 <= started[1] - started[0] <= 60 + 1  # its own 30 s, and as much for the images


class QueueMachine(RuleBasedStateMachine):
    """In any order of arrivals, departures, deadlines and batches, no ticket is lost, doubled or started too late."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: Queue[Ticket] = Queue(batch_pixels=10, max_batch=4)
        self.waiting: list[Ticket] = []
        self.now = 0.0

    @rule(
        model=st.sampled_from(["sd", "flux"]),
        key=st.integers(0, 2),
        pixels=st.integers(1, 12),
        seconds=st.floats(0.01, 60),
        patience=st.floats(0.1, 100),
        is_alone=st.booleans(),
    )
    def arrive(self, model: str, key: int, pixels: int, seconds: float, patience: float, is_alone: bool) -> None:
        came = ticket(coder=model, key=(model, key), pixels=pixels, seconds=seconds, is_alone=is_alone)
        came.arrived, came.deadline = self.now, self.now + patience
        self.queue.put(came)
        self.waiting.append(came)

    @rule(seconds=st.floats(0.01, 50))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        late = self.queue.expire(self.now)
        assert set(late) == {t for t in self.waiting if t.deadline <= self.now}
        self.waiting = [t for t in self.waiting if t not in late]

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.waiting:
            gone = data.draw(st.sampled_from(self.waiting))
            self.waiting.remove(gone)
            self.queue.remove(gone)
            self.queue.remove(gone)  # removing it again has no effect

    @rule(models=st.sets(st.sampled_from(["sd", "flux"])))
    def take(self, models: set[str]) -> None:
        runnable = [t for t in self.waiting if t.coder in models]
        batch = self.queue.take(models.__contains__)
        assert bool(batch) == bool(runnable)
        if not batch:
            return
        assert batch[0].tag == min(t.tag or 0 for t in runnable)
        assert len({t.key for t in batch}) == 1
        assert len(batch) == 1 or (sum(t.pixels for t in batch) <= 10 and len(batch) <= 4)
        assert len(batch) == 1 or not any(t.is_alone for t in batch)
        self.waiting = [t for t in self.waiting if t not in batch]

    @invariant()
    def the_queue_holds_who_waits(self) -> None:
        assert sorted(map(id, self.queue)) == sorted(map(id, self.waiting))
        assert len(self.queue) == len(self.waiting)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_removing_the_last_ticket_of_a_flow_gives_its_place_back() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=3, max_batch=16)
    first, second, third = (ticket(seconds=10.0) for _ in range(3))
    queue.put(first)
    queue.put(second)
    queue.remove(second)
    queue.put(third)
    assert (first.tag, third.tag) == (0.0, 10.0)


def test_short_work_is_taken_while_its_share_lasts() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=1, max_batch=16)
    for arrived in range(4):
        queue.put(ticket(arrived=arrived, seconds=2.0))
    assert len(queue.take_short(anything, longest_s=1, latest_tag=10)) == 0
    assert [t.tag for t in queue.take_short(anything, longest_s=2, latest_tag=3)] == [0.0]
    assert [t.tag for t in queue.take_short(anything, longest_s=2, latest_tag=3)] == [2.0]
    assert queue.take_short(anything, longest_s=2, latest_tag=3) == []
    assert len(queue) == 2


def test_the_work_before_a_ticket_is_that_of_lower_tags() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=1, max_batch=16)
    tickets = [ticket(arrived=arrived, seconds=2.0) for arrived in range(3)]
    for each in tickets:
        queue.put(each)
    other = ticket(coder="flux", arrived=9.0)
    queue.put(other)
    assert [queue.seconds_before(each, anything) for each in tickets] == [0.0, 3.0, 5.0]
    assert queue.seconds_before(other, anything) == 2.0
    assert queue.seconds_before(tickets[2], lambda other: other.coder == "sd") == 4.0


def test_a_long_ticket_ahead_does_not_keep_short_work_from_running_beside() -> None:
    queue: Queue[Ticket] = Queue(batch_pixels=1, max_batch=16)
    long, short = ticket(coder="video", seconds=60.0), ticket(arrived=1.0, seconds=0.1)
    queue.put(long)
    queue.put(short)
    assert queue.take_short(anything, longest_s=1, latest_tag=0) == [short]
    assert queue.take(anything) == [long]
