"""All errors of the server in one tree, each with its HTTP status, its stable code and, for some, a Retry-After.

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

    ConfigError (not a ServerError): a mistake in models.yaml, a flag or an environment variable.
        Ends the process with exit status 2.

The text of an error is one sentence: what was wrong, what was expected, what to do next. Clients read it, so it never
contains a path, an address or a traceback. `ModelUnavailable.detail` and ConfigError may contain them, because only the
operator reads those.
"""

from __future__ import annotations

OUR_FAULT = "the server failed on this request"
WHY_IN_LOG = "the server's log says why"


class ServerError(Exception):
    """The base of all errors that a client is told. `str(error)` is the sentence that the client reads.

    Without a sentence, the error is a fault of the server, and the client is told to have the operator read the log.

    status: the HTTP status.
    code: a word that never changes, for programs.
    retry_after_s: the Retry-After header, in seconds; None for no header.
    operator_task: what the operator of the server can do about the error, as an infinitive without "to": "raise
        max_pixels in models.yaml". None if the operator can do nothing.
    before_task: the text between the sentence and `operator_task`.
    in_log: a clause that says what the server's log tells about the error, such as WHY_IN_LOG; None for nothing.
    """

    status = 500
    code = "internal"
    retry_after_s: int | None = None
    operator_task: str | None = None
    before_task = "; "
    in_log: str | None = None

    def __init__(self, *words: object, operator_task: str | None = None) -> None:
        """Make the error. words: the sentence, or nothing. operator_task: replaces the task of the class."""
        super().__init__(*words)
        if operator_task is not None:
            self.operator_task = operator_task

    def name_tensor(self, name: str) -> None:
        """Put the name of the tensor that the error is about before its sentence."""
        self.args = (f"{name}: {super().__str__()}",)

    def told(self, *, to_operator: bool) -> str:
        """Return the sentence, together with what the operator can do about the error.

        to_operator: the reader is the operator, so the task is stated directly. Otherwise the sentence says to ask or
            tell the operator.
        """
        sentence, in_log = super().__str__(), self.in_log
        if not sentence:
            sentence, in_log = OUR_FAULT, "its log has the reason under this request_id"
        if in_log is not None:
            return f"{sentence}; {in_log}" + ("" if to_operator else "; tell its operator")
        if self.operator_task is None:
            return sentence
        return sentence + self.before_task + ("" if to_operator else "ask its operator to ") + self.operator_task

    def __str__(self) -> str:
        return self.told(to_operator=False)


class BadRequest(ServerError):
    """A parameter, a header or the body cannot be read, or its value is not allowed."""

    status = 400
    code = "bad_request"


class WrongLength(BadRequest):
    """The body does not have the number of bytes that shape and dtype need."""

    code = "wrong_length"


class WrongShape(BadRequest):
    """The number of axes, channels or tokens in `shape` does not fit the model."""

    code = "wrong_shape"


class WrongChannels(WrongShape):
    """The latents have another number of channels than the model's."""


class NonFiniteInput(BadRequest):
    """The tensor of the request contains NaN or infinity."""

    code = "nonfinite_input"


class FreedMemory(BadRequest):
    """The client sent memory that it had already freed, so a few values are not those of the tensor."""

    code = "freed_memory"


class MalformedRequest(BadRequest):
    """The request is not valid HTTP/1.1, or can be read in two ways."""

    code = "malformed_request"


class UpgradeRefused(BadRequest):
    """The request asks for WebSocket, HTTP/2 without TLS, or CONNECT."""

    code = "upgrade_refused"


class Unauthorized(ServerError):
    """The request has no valid API key, and the server requires one."""

    status = 401
    code = "unauthorized"


class NotFound(ServerError):
    """No route has this path."""

    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    """No model has this name. The sentence lists the known names."""

    code = "unknown_model"


class MethodNotAllowed(ServerError):
    """The path exists, but does not support this method."""

    status = 405
    code = "method_not_allowed"


class NotAcceptable(ServerError):
    """The server cannot answer in any format that the client accepts."""

    status = 406
    code = "not_acceptable"


class RequestTooSlow(ServerError):
    """The head or the body of the request did not arrive in time."""

    status = 408
    code = "request_too_slow"


class TooLarge(ServerError):
    """The body, or the number of pixels, frames or batch items, exceeds a limit."""

    status = 413
    code = "too_large"
    before_task = ", or "


class TooLargeForDevice(TooLarge):
    """The request needs more memory than the device has."""

    code = "too_large_for_device"


class CrossSite(ServerError):
    """A web page of an origin that may not use this server sent the request."""

    status = 403
    code = "cross_site"
    operator_task = "list the page's origin in --cors-origins"


class UnsupportedBody(ServerError):
    """The server does not read this type or encoding of a body."""

    status = 415
    code = "unsupported_body"


class WrongHost(ServerError):
    """The Host header has a name that this server does not accept."""

    status = 421
    code = "wrong_host"
    operator_task = "add it with --allowed-hosts"


class Impossible(ServerError):
    """The request is well-formed, but asks for something that cannot be done."""

    status = 422
    code = "impossible"


class HeadTooLarge(ServerError):
    """The request line and the headers are larger than their limit."""

    status = 431
    code = "head_too_large"


class QueueFull(ServerError):
    """The server holds as many requests, or as many bytes of requests, as it may."""

    status = 429
    code = "queue_full"

    def __init__(self, sentence: str, retry_after_s: int) -> None:
        """Make the error. retry_after_s: when a retry may succeed, in seconds."""
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class NotDone(ServerError):
    """The result of a job was asked for before the job is done."""

    status = 409
    code = "not_done"

    def __init__(self, sentence: str, retry_after_s: int) -> None:
        """Make the error. retry_after_s: when to ask again, in seconds."""
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class IdempotencyConflict(ServerError):
    """An `Idempotency-Key` was sent with two different requests."""

    status = 409
    code = "idempotency_conflict"


class Unavailable(ServerError):
    """The server is starting, is draining, or has no running worker."""

    status = 503
    code = "unavailable"
    retry_after_s = 5


class Broken(Unavailable):
    """The server cannot serve this request until the operator has fixed something."""

    in_log = WHY_IN_LOG


class ModelUnavailable(Broken):
    """A model cannot be loaded. `str(error)` is for the client, `detail` for the operator."""

    code = "model_unavailable"

    def __init__(self, model: str, detail: str, retry_after_s: int = 60) -> None:
        """Make the error.

        model: the model's name.
        detail: why it cannot be loaded; may contain paths.
        retry_after_s: how long the server will not try to load the model again, in seconds.
        """
        super().__init__(f"the model '{model}' cannot be loaded on this server")
        self.model = model
        self.detail = detail
        self.retry_after_s = retry_after_s


class WorkerCrashed(ServerError):
    """Worker processes ended repeatedly while they had this request, so the server gave it up."""

    code = "worker_crashed"
    in_log = WHY_IN_LOG


class TooManyConnections(Unavailable):
    """The server already has as many open connections as it may."""

    code = "too_many_connections"


class DeadlinePassed(ServerError):
    """The request was not done before its deadline, or is estimated to take longer than that."""

    status = 504
    code = "deadline_passed"

    def __init__(self, sentence: str, retry_after_s: int | None = None) -> None:
        """Make the error. retry_after_s: when a retry may succeed, in seconds; None if a retry does not help."""
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class ConfigError(Exception):
    """The configuration cannot be used. The sentence names the file or option, the key, and what was expected."""
