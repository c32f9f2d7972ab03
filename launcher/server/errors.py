"""Error responses of the server: HTTP status and OpenAI's error object."""

from typing import Any

from parallel.errors import TandemError


class ServiceError(TandemError):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.retry_after_seconds = status, kind, param, code, retry_after_seconds

    def to_json(self) -> dict[str, Any]:
        """Build the response body."""
        return {"error": {"message": _printable(str(self)), "type": self.kind, "param": _printable(self.param), "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Build the additional response headers."""
        return {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}


def queue_full(waiting: int, wanted: int, most: int, retry_after_seconds: int) -> ServiceError:
    """429: the queue is full. All counts are in sequences."""
    return ServiceError(
        429,
        f"{waiting} sequences wait and {wanted} more are requested, but at most {most} may wait; try again in {retry_after_seconds} s",
        kind="rate_limit_error",
        code="queue_full",
        retry_after_seconds=retry_after_seconds,
    )


def too_many_requests(most: int) -> ServiceError:
    """429: one client has too many requests in progress."""
    words = f"{most} requests of this client are in progress, which is the maximum; wait for an answer"
    return ServiceError(429, words, kind="rate_limit_error", code="too_many_requests", retry_after_seconds=1)


def too_many(sequences: int, most: int) -> ServiceError:
    """400: the request could never be queued, so retrying would not help."""
    return ServiceError(400, f"{sequences} answers are requested at once (prompts times n), but at most {most} are allowed")


def draining() -> ServiceError:
    """503: the server is shutting down."""
    return ServiceError(503, "the server is shutting down; try another one", kind="server_error", code="draining", retry_after_seconds=5)


def busy() -> ServiceError:
    """503: the server is briefly overloaded."""
    words = "the server is busy with other requests; try again in 1 s"
    return ServiceError(503, words, kind="server_error", code="busy", retry_after_seconds=1)


def timed_out(seconds: float) -> ServiceError:
    """504: the request exceeded its deadline."""
    return ServiceError(
        504, f"the answer was not complete after {seconds:g} s, the deadline of this request", kind="timeout_error", code="timeout"
    )


def ranks_failed(times: int) -> ServiceError:
    """500: the ranks failed repeatedly on this request."""
    words = f"the ranks failed {times} times while this request ran, without a token in between; it was abandoned"
    return ServiceError(500, words, kind="server_error", code="ranks_failed")


def non_finite(message: str) -> ServiceError:
    """500: the model produced non-finite values for this prompt."""
    return ServiceError(500, message, kind="server_error", code="logits_not_finite")


def no_token_allowed(message: str) -> ServiceError:
    """400: the restrictions of a request exclude every token."""
    return ServiceError(400, message, code="no_token_allowed")


def server_failed() -> ServiceError:
    """500: an unexpected error."""
    return ServiceError(500, "the server failed; see its log", kind="server_error")


def client_gone() -> ServiceError:
    """499, nginx's status for a client that has disconnected."""
    return ServiceError(499, "the client has disconnected")


def ended() -> ServiceError:
    """503: the server exited in the middle of an answer."""
    return ServiceError(503, "the server ended before the answer was complete", kind="server_error", code="ended")


def _printable(text: str | None) -> str | None:
    """Replace lone surrogates, which JSON can express but no response can encode."""
    return text and text.encode("utf-8", "backslashreplace").decode()
