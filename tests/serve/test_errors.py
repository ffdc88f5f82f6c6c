"""What clients are told of errors: OpenAI's object, and a status that says whose fault it is."""

import pytest

from omni_jax.errors import InputError, MemoryLimitError
from omni_jax.serve.errors import RequestError, invalid, naming, request_error, too_large


@pytest.mark.parametrize(
    "error, status, kind, code",
    [
        (InputError("bad"), 400, "invalid_request_error", None),
        (MemoryLimitError("big"), 400, "invalid_request_error", "memory_limit"),
        (MemoryError(), 503, "server_error", "out_of_memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), 503, "server_error", "out_of_memory"),
        (KeyError("secret"), 500, "server_error", "internal_error"),
        (too_large("more than 3 bytes"), 413, "invalid_request_error", "too_large"),
        (invalid("bad", "n"), 400, "invalid_request_error", None),
        (RequestError(401, "no key"), 401, "authentication_error", None),
        (RequestError(429, "busy", retry_seconds=3), 429, "rate_limit_error", None),
    ],
)
def test_errors_as_clients_see_them(error, status, kind, code):
    found = request_error(error)
    stated = found.body()["error"]
    assert (found.status, stated["type"], stated["code"]) == (status, kind, code)
    assert stated.keys() == {"message", "type", "param", "code"} and "secret" not in stated["message"]


def test_headers():
    assert RequestError(429, "busy", retry_seconds=3).headers() == {"Retry-After": "3"}
    assert RequestError(401, "no key").headers() == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize(
    "message, param, told",
    [
        ("max_new_tokens is 9; ask for fewer", "max_tokens", "max_tokens is 9; ask for fewer"),
        ("stop id 7 is outside the vocabulary", "stop_token_ids", "stop_token_ids 7 is outside the vocabulary"),
        ("the sound is damaged", "messages", "the sound is damaged"),
    ],
)
def test_errors_name_the_fields_of_the_client(message, param, told):
    names = {"max_new_tokens": "max_tokens", "stop": "stop", "stop_ids": "stop_token_ids"}
    with pytest.raises(RequestError) as caught, naming(names, "messages"):
        raise InputError(message)
    assert (caught.value.param, caught.value.message) == (param, told)


def test_errors_of_the_server_stay_what_they_are():
    with pytest.raises(KeyError), naming({"max_frames": "max_frames"}):
        raise KeyError("max_frames")
    with pytest.raises(RequestError) as caught, naming({}, "messages"):
        raise RequestError(429, "busy")
    assert caught.value.param is None
