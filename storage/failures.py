"""What a storage client's exception means: try again, someone else won, or one line for the user.

s3fs turns most server errors into OSError and keeps botocore's error as the cause; some pass through as they are.
Names are compared instead of classes, so that no client is imported for it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from rabatch.errors import StoreError

REBUILD = "withdraw it with `rabatch verify --remove-damaged`, then build again"
"""What mends an index whose stored bytes are wrong: while it is committed, a build skips its document."""

_TRANSIENT_CODES = {
    *("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "ServiceUnavailable", "InternalError"),
    *("ConditionalRequestConflict", "OperationAborted", "409", "429", "500", "502", "503", "504"),
}
_TRANSIENT_NAMES = {
    *("HTTPClientError", "FSTimeoutError", "IncompleteRead", "ClientPayloadError", "ResponseParserError"),
    *("ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "ResponseStreamingError"),
}
_TRANSIENT_ERRNOS = {errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE}
_REFUSED_CODES = {
    *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
    *("AccountProblem", "RequestTimeTooSkewed", "401", "403"),
}
_CONFLICT_CODES = {"PreconditionFailed", "412"}


class MissingFileError(StoreError):
    """There is no such file."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment: throttling, dropped connections, timeouts."""
    for cause in _chain(error):
        if isinstance(cause, ConnectionError | TimeoutError) or _names(cause) & _TRANSIENT_NAMES:
            return True
        if _code(cause) in _TRANSIENT_CODES or (isinstance(cause, OSError) and cause.errno in _TRANSIENT_ERRNOS):
            return True
    return False


def is_conflict(error: BaseException) -> bool:
    """Whether a put-if-absent found a file there. Servers other than AWS do not say which condition failed."""
    return isinstance(error, FileExistsError) or any(_code(cause) in _CONFLICT_CODES for cause in _chain(error))


def is_out_of_range(error: BaseException) -> bool:
    """Whether a ranged read began past the end of the file."""
    return any(_code(cause) in ("InvalidRange", "416") for cause in _chain(error))


def store_error(error: BaseException, url: str) -> StoreError:
    """The error in one line, naming the URL and the fix."""
    if isinstance(error, StoreError):
        return error
    kind, fix = _explain(error)
    return kind("store", url, fix)


def _explain(error: BaseException) -> tuple[type[StoreError], str]:
    codes = {_code(cause) for cause in _chain(error)}
    names = set().union(*(_names(cause) for cause in _chain(error)))
    number = error.errno if isinstance(error, OSError) else None
    if "NoSuchBucket" in codes:
        return StoreError, "the bucket does not exist; create it or correct the URL"
    if names & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return StoreError, "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    if codes & _REFUSED_CODES:
        return StoreError, f"access denied ({_line(error)}); check credentials and permissions"
    if "EndpointConnectionError" in names:
        return StoreError, "the server does not answer; check the endpoint and the network"
    if isinstance(error, ImportError):
        return StoreError, f"{_line(error)}; for S3: pip install 'rabatch[s3]'"
    if isinstance(error, FileNotFoundError):
        return MissingFileError, "there is no such file; check the path"
    if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
        return StoreError, "a file lies where a folder is needed, or the reverse; choose another path"
    if number == errno.EROFS:
        return StoreError, "the filesystem is read-only; choose another path"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StoreError, "no space left; free some or choose another path"
    if number in (errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS) or (
        number == errno.EPERM and getattr(error, "filename2", None)
    ):
        return StoreError, "this filesystem has no hard links, which an atomic create needs; use another, or S3"
    if isinstance(error, PermissionError):
        return StoreError, f"access denied ({_line(error)}); check credentials and permissions"
    if is_transient(error):
        return StoreError, f"gave up after several attempts ({_line(error)}); try again later"
    return StoreError, f"{type(error).__name__}: {_line(error)}; check the URL and the storage options"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _code(error: BaseException) -> str:
    """The S3 error code of a botocore ClientError, else an empty string."""
    response = getattr(error, "response", None)
    details = response.get("Error", {}) if isinstance(response, dict) else {}
    return str(details.get("Code", "")) if isinstance(details, dict) else ""


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
