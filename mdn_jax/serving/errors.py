"""Errors of requests, in OpenAI's format."""

from collections.abc import Mapping
from typing import Any


class RequestError(Exception):
    """What a request is answered with in place of what it asked for.

    Attributes:
      status: of HTTP.
      message: which field, what was expected, what came.
      field: the field that did not fit, or None.
      code: a short name of the error, or None.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as clients of OpenAI's interface read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.field, "code": self.code}
        return {"error": error}


def unfit(field: str, expected: str, got: Any) -> RequestError:
    """A field that does not fit: status 400."""
    return RequestError(400, f"{field}: expected {expected}, got {shown(got)}", field=field)


def shown(value: Any) -> str:
    """A value from a request, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
