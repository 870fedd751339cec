"""Every error of the server, one tree: its HTTP status, its stable code, whether a retry can help.

    ServerError 500 internal
    ├── BadRequest 400 bad_request
    │   ├── WrongLength wrong_length · WrongShape wrong_shape · NonFiniteInput nonfinite_input
    ├── Unauthorized 401 · NotFound 404 (UnknownModel unknown_model) · MethodNotAllowed 405
    ├── NotAcceptable 406 · TooLarge 413 (TooLargeForDevice) · UnsupportedBody 415 · Impossible 422
    ├── NotSupportedYet 501
    ├── WorkerCrashed 500 worker_crashed
    ├── QueueFull 429 · Unavailable 503 (ModelUnavailable) · DeadlinePassed 504      (worth a retry)
    └── ConfigError: models.yaml, a flag or an environment variable; ends the process with exit status 2

The text of an error is one sentence for its reader: what was wrong, what was expected, what to do next. It never holds
a path, an address or a traceback; `ModelUnavailable.detail` and ConfigError may, they are for the operator.
"""

from __future__ import annotations


class ServerError(Exception):
    """A request that ends without its picture. `str(error)` is the sentence the client reads."""

    status = 500
    code = "internal"
    retry_after_s: int | None = None


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


class NonFiniteInput(BadRequest):
    """NaN or Inf in the latents."""

    code = "nonfinite_input"


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


class TooLarge(ServerError):
    """Body, pixels, frames or batch over a limit."""

    status = 413
    code = "too_large"


class TooLargeForDevice(TooLarge):
    """The decode does not fit the device's memory."""

    code = "too_large_for_device"


class UnsupportedBody(ServerError):
    """A body type or encoding that is not read."""

    status = 415
    code = "unsupported_body"


class Impossible(ServerError):
    """Understood, and impossible."""

    status = 422
    code = "impossible"


class QueueFull(ServerError):
    """Too many requests wait already."""

    status = 429
    code = "queue_full"

    def __init__(self, sentence: str, retry_after_s: int) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class NotSupportedYet(ServerError):
    """A part of the contract that this version does not have."""

    status = 501
    code = "not_supported"


class Unavailable(ServerError):
    """Starting, draining, or out of workers."""

    status = 503
    code = "unavailable"
    retry_after_s = 5


class ModelUnavailable(Unavailable):
    """The model cannot be loaded. `str(error)` is for clients; `detail` may name paths and is for the operator."""

    code = "model_unavailable"
    retry_after_s = 60

    def __init__(self, model: str, detail: str) -> None:
        super().__init__(f"the model '{model}' cannot be loaded on this server; its log says why, tell its operator")
        self.model = model
        self.detail = detail


class WorkerCrashed(ServerError):
    """The process that decoded the request ended, twice."""

    code = "worker_crashed"


class DeadlinePassed(ServerError):
    """The request took longer than its deadline."""

    status = 504
    code = "deadline_passed"


class ConfigError(Exception):
    """A configuration that cannot be used: the file, the key, what was expected."""
