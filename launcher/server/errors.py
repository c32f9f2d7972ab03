"""What a server answers when it cannot do what is asked: a status, and OpenAI's form of an error. Knows no HTTP library."""

from typing import Any

from parallel.errors import TandemError


class ServiceError(TandemError):
    """A request that is not answered as asked."""

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
        """The body."""
        return {"error": {"message": _printable(str(self)), "type": self.kind, "param": _printable(self.param), "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        return {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}


def queue_full(waiting: int, wanted: int, most: int, retry_after_seconds: int) -> ServiceError:
    """429, in sequences."""
    return ServiceError(
        429,
        f"{waiting} sequences wait and {wanted} more are asked for, but {most} may wait; try again in {retry_after_seconds} s",
        kind="rate_limit_error",
        code="queue_full",
        retry_after_seconds=retry_after_seconds,
    )


def too_many(sequences: int, most: int) -> ServiceError:
    """400: waiting would not help."""
    return ServiceError(400, f"{sequences} answers are asked for at once (prompts times n), but {most} are taken at most")


def draining() -> ServiceError:
    """503."""
    return ServiceError(503, "the server is shutting down; try another one", kind="server_error", code="draining", retry_after_seconds=5)


def timed_out(seconds: float) -> ServiceError:
    """504."""
    return ServiceError(
        504, f"the answer was not complete after {seconds:g} s, the deadline of this request", kind="timeout_error", code="timeout"
    )


def ranks_failed(times: int) -> ServiceError:
    """500."""
    words = f"the ranks failed {times} times while this request ran, without a token in between; it was given up"
    return ServiceError(500, words, kind="server_error", code="ranks_failed")


def server_failed() -> ServiceError:
    """500, where nobody foresaw it."""
    return ServiceError(500, "the server failed; its log says why", kind="server_error")


def caller_gone() -> ServiceError:
    """499, as others count it: nobody will read this."""
    return ServiceError(499, "the caller has gone")


def ended() -> ServiceError:
    """503, in the middle of an answer."""
    return ServiceError(503, "the server ended before the answer was complete", kind="server_error", code="ended")


def _printable(text: str | None) -> str | None:
    """Without halves of surrogate pairs, which JSON can name but no answer can hold."""
    return text and text.encode("utf-8", "backslashreplace").decode()
