"""Every error of the server, one tree: its HTTP status, its stable code, whether a retry can help.

    ServerError 500 internal
    ├── BadRequest 400 bad_request
    │   ├── WrongLength wrong_length · WrongShape wrong_shape
    │   ├── NonFiniteInput nonfinite_input · FreedMemory freed_memory
    │   ├── MalformedRequest malformed_request · UpgradeRefused upgrade_refused
    ├── Unauthorized 401 · CrossSite 403 · NotFound 404 (UnknownModel unknown_model) · MethodNotAllowed 405
    ├── NotAcceptable 406 · RequestTooSlow 408 · TooLarge 413 (TooLargeForDevice) · UnsupportedBody 415
    ├── WrongHost 421 · Impossible 422 · HeadTooLarge 431
    ├── WorkerCrashed 500 worker_crashed
    ├── QueueFull 429 · Unavailable 503 (Broken, ModelUnavailable, TooManyConnections) · DeadlinePassed 504: try again
    └── ConfigError: models.yaml, a flag or an environment variable; ends the process with exit status 2

The text of an error is one sentence for its reader: what was wrong, what was expected, what to do next. It never holds
a path, an address or a traceback; `ModelUnavailable.detail` and ConfigError may, they are for the operator.
"""

from __future__ import annotations

OUR_FAULT = "the server failed on this request"
WHY_IN_LOG = "its log says why"


class ServerError(Exception):
    """A request that ends without its answer. `str(error)` is the sentence the client reads.

    operator_task: what only the server's operator can do about it, as an infinitive. before_task: what joins it on.
    in_log: what the server's log says more.
    """

    status = 500
    code = "internal"
    retry_after_s: int | None = None
    operator_task: str | None = None
    before_task = "; "
    in_log: str | None = None

    def __init__(self, *words: object, operator_task: str | None = None) -> None:
        super().__init__(*words)
        if operator_task is not None:
            self.operator_task = operator_task

    def told(self, *, to_operator: bool) -> str:
        """Return the sentence: with what to do for the operator, with whom to ask or tell for anyone else."""
        sentence, in_log = super().__str__(), self.in_log
        if not sentence:
            sentence, in_log = OUR_FAULT, "its log has the reason under this request_id"
        if in_log is not None:
            return f"{sentence}; {in_log}" + ("" if to_operator else ", tell its operator")
        if self.operator_task is None:
            return sentence
        return sentence + self.before_task + ("" if to_operator else "ask its operator to ") + self.operator_task

    def __str__(self) -> str:
        return self.told(to_operator=False)


class BadRequest(ServerError):
    """Unreadable parameters."""

    status = 400
    code = "bad_request"


class WrongLength(BadRequest):
    """The body's byte count is not what shape and dtype need."""

    code = "wrong_length"


class WrongShape(BadRequest):
    """The rank, the channels or the token count do not fit the model."""

    code = "wrong_shape"


class WrongChannels(WrongShape):
    """Latents of another model's channels."""


class NonFiniteInput(BadRequest):
    """NaN or Inf in the latents."""

    code = "nonfinite_input"


class FreedMemory(BadRequest):
    """The client sent memory that it had freed: a few values are not the tensor's."""

    code = "freed_memory"


class MalformedRequest(BadRequest):
    """Not HTTP/1.1, or HTTP/1.1 that can be read in two ways."""

    code = "malformed_request"


class UpgradeRefused(BadRequest):
    """WebSocket, HTTP/2 over cleartext, CONNECT."""

    code = "upgrade_refused"


class Unauthorized(ServerError):
    """A key is required."""

    status = 401
    code = "unauthorized"


class NotFound(ServerError):
    """No such route."""

    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    """No such model; the sentence lists the known ones."""

    code = "unknown_model"


class MethodNotAllowed(ServerError):
    """The route exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class NotAcceptable(ServerError):
    """No representation that the client accepts."""

    status = 406
    code = "not_acceptable"


class RequestTooSlow(ServerError):
    """Head or body did not come in time."""

    status = 408
    code = "request_too_slow"


class TooLarge(ServerError):
    """Body, pixels, frames or batch over a limit."""

    status = 413
    code = "too_large"
    before_task = ", or "


class TooLargeForDevice(TooLarge):
    """It does not fit the device's memory."""

    code = "too_large_for_device"


class CrossSite(ServerError):
    """Sent by a web page of another origin, which may not use this server."""

    status = 403
    code = "cross_site"
    operator_task = "list the page's origin in --cors-origins"


class UnsupportedBody(ServerError):
    """A body type or encoding that is not read."""

    status = 415
    code = "unsupported_body"


class WrongHost(ServerError):
    """A name that this server does not answer for."""

    status = 421
    code = "wrong_host"
    operator_task = "add it with --allowed-hosts"


class Impossible(ServerError):
    """Understood, and impossible."""

    status = 422
    code = "impossible"


class HeadTooLarge(ServerError):
    """Request line and headers over their limit."""

    status = 431
    code = "head_too_large"


class QueueFull(ServerError):
    """Too many requests wait already."""

    status = 429
    code = "queue_full"

    def __init__(self, sentence: str, retry_after_s: int) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Unavailable(ServerError):
    """Starting, draining, or out of workers."""

    status = 503
    code = "unavailable"
    retry_after_s = 5


class Broken(Unavailable):
    """Nothing can be served until the operator does something."""

    in_log = WHY_IN_LOG


class ModelUnavailable(Broken):
    """The model cannot be loaded. `str(error)` is for clients; `detail` may name paths and is for the operator."""

    code = "model_unavailable"

    def __init__(self, model: str, detail: str, retry_after_s: int = 60) -> None:
        super().__init__(f"the model '{model}' cannot be loaded on this server")
        self.model = model
        self.detail = detail
        self.retry_after_s = retry_after_s


class WorkerCrashed(ServerError):
    """The process that ran the request ended, twice."""

    code = "worker_crashed"
    in_log = WHY_IN_LOG


class TooManyConnections(Unavailable):
    """More open connections than the server keeps."""

    code = "too_many_connections"


class DeadlinePassed(ServerError):
    """The request took longer than its deadline."""

    status = 504
    code = "deadline_passed"

    def __init__(self, sentence: str, retry_after_s: int | None = None) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class ConfigError(Exception):
    """A configuration that cannot be used: the file, the key, what was expected."""
