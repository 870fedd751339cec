"""Run the server of the command `serve`, which never imports torch in this process."""

from __future__ import annotations

import logging
import resource
import socket
from contextlib import suppress

import click

from ..config import REFUSED_SHARE, Settings
from ..errors import ConfigError

log = logging.getLogger(__name__)

# The open files of the front process in addition to its connections: its own files, the connections to its workers, and
# the files that ffmpeg reads.
OTHER_FILES = 40


def fit_connections(settings: Settings) -> Settings:
    """Raise this process's limit of open files as far as `max_connections` needs it.

    If the limit cannot be raised so far, return settings with a lower `max_connections`, and log a warning. Without
    that, waiting connections would be closed without an answer when the limit is reached. Connections that are refused
    are also open for a moment, see `REFUSED_SHARE`.
    """
    options = settings.options
    needed = OTHER_FILES + options.max_connections + options.max_connections // REFUSED_SHARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return settings
    fitting = max(1, (soft - OTHER_FILES) * REFUSED_SHARE // (REFUSED_SHARE + 1))
    log.warning(
        "max_connections is %d instead of %d, because this process may have only %d open files; raise the limit "
        "(ulimit -n, LimitNOFILE=, --ulimit nofile=)",
        fitting,
        options.max_connections,
        soft,
    )
    return settings.model_copy(update={"options": options.model_copy(update={"max_connections": fitting})})


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket, to be made before anything slow, so that early clients wait instead of failing.

    Raises ConfigError if the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
        ) from None
    return listener


def run_server(settings: Settings, listener: socket.socket) -> None:
    """Serve until a signal arrives.

    Raises ModelUnavailable or ConfigError if a model or a device that is needed at the start cannot be used.
    """
    from .. import ffmpeg
    from ..metrics import Metrics
    from ..scheduling.dispatcher import Dispatcher
    from ..scheduling.service import Service, State
    from ..web.app import create_app
    from ..web.drain import DrainingServer
    from ..workers.devices import engines_for
    from ..workers.starting import start_forkserver
    from .advertising import Advertisement

    advertisement = Advertisement(settings, listener) if settings.options.advertise else None
    start_forkserver()
    with suppress(RuntimeError):  # images need no ffmpeg, and `check` reports that there is none
        ffmpeg.executable()
    metrics = Metrics()
    dispatcher = Dispatcher(engines_for(settings, metrics), settings.options)
    service = Service(settings, dispatcher, metrics)

    def on_started() -> None:
        if service.state is State.FAILED:
            server.should_exit = True
        elif service.state is State.READY:
            announce(settings, listener)
            if advertisement:
                advertisement.start()

    app = create_app(service, on_started)
    server = DrainingServer(service, app, advertisement.end if advertisement else None)
    try:
        server.run(sockets=[listener])
    finally:
        dispatcher.kill()  # after a second signal, the engines have no time to end by themselves
    if service.failure:
        raise service.failure


def announce(settings: Settings, listener: socket.socket) -> None:
    """Print the address to use in a client, and a warning if everyone may use it."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.options.tls_cert else "http"
    url = f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"
    others = [name for name in settings.models if name != settings.default]
    click.echo(f"ready: {url} decodes with '{settings.default}'", err=True)
    if others:
        click.echo(f"       {url}NAME decodes with {', '.join(others)}", err=True)
    if not settings.api_keys and host not in ("127.0.0.1", "::1"):
        click.echo(
            "       every client that can reach this address may use it; to require keys, set --api-key-file", err=True
        )
