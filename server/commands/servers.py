"""Find a server that runs on this machine, and send requests to a server, for the commands `decode` and `encode`."""

from __future__ import annotations

import json
import os
import secrets
import socket
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
from urllib3.exceptions import InsecureRequestWarning

from ..config import paths
from ..errors import ConfigError
from ..own_thread import in_own_thread
from .status_line import StatusLine

CONNECT_S, WATCH_S = 10, 1
FIND_S = (1, 5)  # to connect, and to answer
MOST_BYTES = 16 << 20  # of the list of models
NO_SERVER_HINT = "; without this server: --no-server"
NO_SERVER = "is this a VAE decode server?"
NOT_TLS = ("WRONG_VERSION_NUMBER", "WRONG VERSION NUMBER", "RECORD LAYER FAILURE")  # OpenSSL of a plain answer


@dataclass(frozen=True)
class Place:
    """A server to send requests to.

    url: the address of decodes. model: the name of the model that answers; None if it is not known.
    is_found: it was found on this machine, not named by the user.
    """

    url: str
    model: str | None = None
    is_found: bool = False

    @property
    def shown(self) -> str:
        """The address without a key."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def _origin(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def ask(
        self, path: str, parameters: Mapping[str, Any], data: bytes, headers: Mapping[str, str], line: StatusLine
    ) -> requests.Response:
        """Send a request, and return its answer. Raises ConfigError if it fails.

        path: of the route, below `url`. line: shows the request's place in the queue, and how far it is.
        """
        request_id = secrets.token_hex(8)
        headers = {**headers, "X-Request-Id": request_id}
        try:
            with (
                line.doing(f"waiting for {self.shown}", lambda: self._progress(request_id)),
                self.session() as session,
            ):
                response = session.post(
                    self.url.rstrip("/") + path if path else self.url,
                    params=parameters,
                    data=data,
                    headers=headers,
                    timeout=(CONNECT_S, None),
                )
        except requests.exceptions.SSLError as error:
            is_plain = any(word in str(error).upper() for word in NOT_TLS)
            told = f"{self.shown}: it does not speak HTTPS; write http://" if is_plain else self.not_trusted()
            raise ConfigError(told) from None
        except requests.RequestException as error:
            told = f"{self.shown}: no answer ({type(error).__name__}); is the server running?"
            is_plain = urlsplit(self.url).scheme == "http"
            raise ConfigError(told + " If it speaks HTTPS, write https://" * is_plain) from None
        except OSError as error:  # by requests, before it connects
            raise ConfigError(unreadable_bundle(error)) from None
        if not response.ok:
            raise ConfigError(f"{self.shown}: {self._sentence(response)}")
        return response

    def not_trusted(self) -> str:
        """Return what to do when the certificate of the server cannot be verified."""
        return (
            f"{self.shown}: its certificate is not trusted here, or is for another name; set REQUESTS_CA_BUNDLE to the "
            "file of its issuer's certificate (a self-signed one is its own issuer's), and give the address with the "
            "certificate's name: --server https://NAME:PORT/" + NO_SERVER_HINT * self.is_found
        )

    def session(self) -> requests.Session:
        """Return a session for requests to the server."""
        session = requests.Session()
        if self.is_found:
            session.trust_env = False  # a proxy is not for this machine
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        return session

    def _sentence(self, response: requests.Response) -> str:
        try:
            sentence = str(response.json()["error"])
        except (json.JSONDecodeError, KeyError, TypeError):
            sentence = f"it answered with status {response.status_code}; {NO_SERVER}"
        return sentence + NO_SERVER_HINT * self.is_found

    def _progress(self, request_id: str) -> str:
        """Return how far a request is, as text; empty if the server does not tell."""
        try:
            with self.session() as session:
                answer = session.get(f"{self._origin}{paths.REQUESTS}/{request_id}/progress", timeout=WATCH_S)
                known = answer.json()
            if known["state"] == "queued":
                return f"queued, {known['position']} before it"
            left = known["seconds_left"]
            return f"{known['progress']:.0%}" + ("" if left is None else f", about {left:.0f} s left")
        except (requests.RequestException, ValueError, KeyError, TypeError):
            return ""


def place_of(url: str, model: str | None) -> Place:
    """Return the server with this address. Raises ConfigError if that is no address of a server."""
    if "://" not in url:
        raise ConfigError(f"{url}: not a URL; write http://{url}")
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError(f"{url}: not the URL of a server, such as http://host:8000/")
    return Place(url, model)


def find(port: int, model: str | None) -> Place | None:
    """Return the server of this project that listens on a port of this machine and has a model; None if none does.

    model: the name or an alias of a model; None for the server's default model. A server that asks for a key is not
    used, because this program knows none. Raises ConfigError if the certificate of such a server is not trusted.
    """
    for scheme in ("http", "https"):
        place = Place(f"{scheme}://127.0.0.1:{port}/", is_found=True)
        with place.session() as session:
            try:
                name = _name_of(model, session, place)
            except requests.exceptions.SSLError:
                if _has_untrusted(model, session, place):
                    raise ConfigError(place.not_trusted()) from None
                return None
            except requests.exceptions.Timeout:
                return None
            except requests.RequestException:
                continue  # nothing listens there, or not with this scheme
            except OSError as error:  # by requests, before it connects
                if _listens(port):
                    raise ConfigError(unreadable_bundle(error)) from None
                return None
        return replace(place, model=name) if name else None
    return None


def unreadable_bundle(error: OSError) -> str:
    """Return what to do when the certificates to trust cannot be read. requests raises the error for their file."""
    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    name = next((name for name in names if os.environ.get(name)), names[0])
    return f"{name}: set it to a file with certificates, or unset it ({error})"


def _listens(port: int) -> bool:
    """Return whether a program listens on a port of this machine."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), FIND_S[0]):
        return True
    return False


def _name_of(model: str | None, session: requests.Session, place: Place) -> str | None:
    """Return the name of a model at a server; None if it does not have it, or is another program.

    Raises RequestException if it does not answer.
    """
    # In a thread of its own, because no timeout of requests bounds an answer as a whole.
    reading = in_own_thread("models", partial(_read, session, place.url.rstrip("/") + paths.MODELS))
    try:
        known = json.loads(reading.result(sum(FIND_S)))
        names = {word: str(each["name"]) for each in known["models"] for word in (each["name"], *each["aliases"])}
        return names.get((model or known["default"]).lower())
    except (TimeoutError, RecursionError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read(session: requests.Session, url: str) -> bytes:
    """Return an answer; empty if it is larger than MOST_BYTES."""
    body = bytearray()
    with session.get(url, timeout=FIND_S, stream=True) as answer:
        for piece in answer.iter_content(1 << 16):
            body += piece
            if len(body) > MOST_BYTES:
                return b""
    return bytes(body)


def _has_untrusted(model: str | None, session: requests.Session, place: Place) -> bool:
    """Return whether a server whose certificate is not trusted has a model. Nothing but this question is sent to it."""
    session.verify = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureRequestWarning)
        try:
            return _name_of(model, session, place) is not None
        except requests.RequestException:
            return False
