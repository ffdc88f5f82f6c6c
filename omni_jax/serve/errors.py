"""The errors of the server: OpenAI's error objects and the status of each.

Whatever goes wrong with a request becomes a `RequestError`: the body of a response, or an event of a stream that has
begun already.
"""

import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omni_jax.errors import MemoryLimitError, OmniError
from omni_jax.files import reason_of
from omni_jax.process import lacks_memory

# The `type` of OpenAI's error object by status; others are of type "invalid_request_error" or "server_error".
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that gets an error for an answer.

    status: of HTTP. message: names the thing and the remedy. param: the field of the body that is wrong. code: a word
    for programs. retry_seconds: when it is worth to try again, the header Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_seconds = retry_seconds

    def body(self) -> dict[str, Any]:
        """OpenAI's object {"error": {"message", "type", "param", "code"}}."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        headers = {} if self.retry_seconds is None else {"Retry-After": str(self.retry_seconds)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(message: str, param: str | None = None) -> RequestError:
    """The error of a body that cannot be used; param: the field that is wrong."""
    return RequestError(400, message, param=param)


@contextmanager
def naming(names: Mapping[str, str], otherwise: str | None = None) -> Iterator[None]:
    """Have errors of input name the fields that a client sent; names: of these, by setting.

    The first setting that a message mentions is what is wrong; if it mentions none, `otherwise` is.
    """
    try:
        yield
    except (RequestError, OmniError) as error:
        found = request_error(error)
        if found.status == 400 and found.param is None and found.code is None:
            words = re.compile("|".join(rf"\b{name}\b" for name in sorted(names, key=len, reverse=True)) or "$^")
            message = found.message.replace("stop id ", "stop_ids ")
            if mentioned := words.search(message):
                found.param = names[mentioned[0]]
                found.message = words.sub(lambda match: names[match[0]], message)
            else:
                found.param = otherwise
        raise found from error


def too_large(message: str, param: str | None = None) -> RequestError:
    """The error of a body, or a part of one, that is beyond a limit; the message names the limit."""
    return RequestError(413, message, param=param, code="too_large")


def request_error(error: BaseException) -> RequestError:
    """Any error as what a client is told: input that cannot be used is its own fault, the rest is the server's."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, MemoryLimitError):
        return RequestError(400, str(error), code="memory_limit")
    if isinstance(error, OmniError):
        return invalid(str(error))
    if lacks_memory(error):
        return RequestError(503, f"there is too little memory for this request ({reason_of(error)}); make it smaller, "
                            "or send it again when fewer run", code="out_of_memory", retry_seconds=1)  # fmt: skip
    return RequestError(500, f"the server failed ({type(error).__name__}); its log says where", code="internal_error")


def told(error: Exception) -> RequestError:
    """What a client is told of an error; the log gets the traceback of one that is a bug."""
    found = request_error(error)
    if found.status == 500 and found is not error:  # what the engine tells, it has logged
        traceback.print_exception(error, file=sys.stderr)
    return found
