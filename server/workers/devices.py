"""Which devices get a worker process, and how many threads each worker has."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Settings
from ..cores import allowed_cores, usable_cores, usual_render_threads
from ..metrics import Metrics
from .process import ProcessEngine, full_name


def threads_for(devices: Sequence[str]) -> int | None:
    """Return the number of CPU threads for each worker; None if torch's own choice is right.

    The workers on the CPU share the cores. A container's limit on CPU time, which torch does not consider, counts like
    a smaller number of cores. devices: the devices of all workers.
    """
    cores = usable_cores()
    threads = max(1, cores // max(1, sum(device in ("auto", "cpu") for device in devices)))
    return threads if threads < allowed_cores() else None


def engines_for(settings: Settings, metrics: Metrics) -> list[ProcessEngine]:
    """Return an engine for each device of `--device`.

    The first engine adds those for other devices that models name, once it knows which device `auto` is.
    """
    shared = settings.options.device.split(",")
    own = {entry.device for entry in settings.models.values() if entry.device not in (None, "auto")}
    others = sorted({full_name(device) for device in own if device} - {full_name(device) for device in shared})
    on_cpu = shared if "auto" in shared else [*shared, *others]  # auto may be the same CPU that a model names
    threads = settings.options.threads or threads_for(on_cpu)
    renders = settings.options.render_threads or usual_render_threads(len(shared) + len(others))
    options = settings.options.model_copy(update={"threads": threads, "render_threads": renders})
    settings = settings.model_copy(update={"options": options})
    first, *rest = shared
    return [
        ProcessEngine(settings, first, metrics, others=others),
        *(ProcessEngine(settings, device, metrics) for device in rest),
    ]
