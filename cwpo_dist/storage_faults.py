"""An error of a disk or a storage service in; what it means, and what to do about it, out.

Every service's client has classes of its own, which come with extras: they are known by the names
of classes, the services' codes, HTTP statuses and the numbers of the operating system.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from cwpo_dist.redaction import redacted


@dataclass(frozen=True)
class Fault:
    """A way in which storage fails.

    Attributes:
        what: in words.
        remedy: what a user does about it.
        codes: of services, and HTTP statuses; with spaces between them, as the next.
        kinds: names of classes of errors.
        numbers: of the operating system.
    """

    what: str
    remedy: str
    codes: str = ""
    kinds: str = ""
    numbers: frozenset[int] = frozenset()

    def has(self, code: str) -> bool:
        """Whether a service's code, or an HTTP status, is one of it."""
        return code in self.codes.split()

    def fits(self, error: BaseException) -> bool:
        """Whether an error's class, or its number, is one of it."""
        names = {kind.__name__ for kind in type(error).__mro__}
        numbered = isinstance(error, OSError) and error.errno in self.numbers
        return numbered or not names.isdisjoint(self.kinds.split())


UNKNOWN_USER = Fault(
    "it does not know who asks: the credentials are missing, wrong or expired",
    "set them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "GOOGLE_APPLICATION_CREDENTIALS) on every node, or renew them",
    codes=(
        "401 InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken ExpiredTokenException "
        "InvalidToken TokenRefreshRequired RequestTimeTooSkewed UnrecognizedClientException"
    ),
    kinds=(
        "NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError "
        "NoAuthTokenError ProfileNotFound UnauthorizedSSOTokenError DefaultCredentialsError "
        "RefreshError"
    ),
)
DENIED = Fault(
    "access is denied",
    "ask its owner for the right to list, read and write there, or use other credentials",
    codes=(
        "403 AccessDenied AccessDeniedException AllAccessDisabled AccountProblem Forbidden "
        "forbidden InvalidObjectState"
    ),
    kinds="PermissionError",
    numbers=frozenset({errno.EACCES, errno.EPERM}),
)
THROTTLED = Fault(
    "it is busy and turns requests away (throttled)",
    "wait some minutes; with fewer actors and workers at once there are fewer requests",
    codes=(
        "429 503 SlowDown ServiceUnavailable Throttling ThrottlingException ThrottledException "
        "RequestLimitExceeded TooManyRequests TooManyRequestsException RequestThrottled "
        "BandwidthLimitExceeded rateLimitExceeded userRateLimitExceeded OperationAborted"
    ),
    numbers=frozenset({errno.EBUSY, errno.EAGAIN}),
)
UNREACHABLE = Fault(
    "it cannot be reached, or broke off",
    "check the network, the name of its host (AWS_ENDPOINT_URL) and whether the service is up",
    codes="408 500 502 504 InternalError RequestTimeout BadGateway",
    kinds=(
        "TimeoutError ConnectionError HTTPClientError gaierror ClientConnectionError "
        "ClientPayloadError TransportError IncompleteRead ResponseParserError "
        "IncompleteReadError RetryError"
    ),
    numbers=frozenset(
        {
            *(errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
            *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.EPIPE),
            *(getattr(errno, "EREMOTEIO", errno.EIO), errno.ESTALE, errno.ENOTCONN),
        }
    ),
)
FULL = Fault(
    "no room is left",
    "free space, or name another place",
    numbers=frozenset({errno.ENOSPC, errno.EDQUOT}),
)
MISSING = Fault(
    "nothing is there",
    "check the name, that of the bucket too",
    codes="404 NoSuchBucket NoSuchKey NotFound notFound",
    kinds="FileNotFoundError NotADirectoryError",
    numbers=frozenset({errno.ENOENT, errno.ENOTDIR}),
)
OTHER = Fault(
    "it fails",
    "your credentials (environment variables) and the network",
)

_LONGEST = 500  # characters of what an error said; a missing driver lists where it looked

# Expired credentials are refused like forbidden ones: what is more exact is asked first.
FAULTS = (UNKNOWN_USER, DENIED, THROTTLED, UNREACHABLE, FULL, MISSING)


def fault_of(error: BaseException) -> Fault | None:
    """What an error of storage means; None where none of its signs is known.

    A service's code says most, and an error's cause more than what its client made of it.
    """
    chain = list(_chain(error))
    by_code = (f for each in chain for code in _codes(each) for f in FAULTS if f.has(code))
    by_kind = (f for each in reversed(chain) for f in FAULTS if f.fits(each))
    return next(by_code, None) or next(by_kind, None)


def unread(place: str, error: Exception) -> str | None:
    """Why a place cannot be read, and the remedy; None where storage is not at fault."""
    fault = _fault_or_other(error)
    if fault is None:
        return None
    why = f"{fault.what} ({told(error)}); {fault.remedy}"
    return f"cannot read {place!r}: {why}, then run the same command again"


def unwritten(place: str, error: Exception, *, on_disk: bool) -> str | None:
    """Why a place cannot be written, and the remedy; None where storage is not at fault."""
    fault = _fault_or_other(error)
    if fault is None:
        return None
    plain = on_disk and fault in {OTHER, DENIED, FULL}  # the system says it well
    what = "" if plain else f"{fault.what}: "
    remedy = "free space or fix permissions" if plain else fault.remedy
    return (
        f"storage refused to write {place!r}: {what}{told(error)}. What was committed stays "
        f"readable; {remedy}, then run the same command again"
    )


def unanswered(error: Exception) -> str:
    """Why a folder cannot be asked for, and the remedy, whoever is at fault."""
    fault = fault_of(error)
    if fault is None:
        return f"{type(error).__name__}: {error}. Check its name, {OTHER.remedy}"
    return f"{fault.what} ({told(error)}); {fault.remedy}"


def damaged(place: str, size: int, what: str, made: str, error: Exception) -> str:
    """That a file is not whole, what to remove for it, and what is made anew by that."""
    return (
        f"{place!r} is {'torn' if size else 'empty'}, as after a power cut or a broken copy; "
        f"remove {what}, then run the same command again: {made} ({error})"
    )


def _fault_or_other(error: Exception) -> Fault | None:
    """Any error of the operating system is one of storage here; of others those that are known."""
    return fault_of(error) or (OTHER if isinstance(error, OSError) else None)


def is_full(error: BaseException) -> bool:
    """True when what failed is that a disk, or a quota, is full, at the root of the error."""
    # safetensors says so in words.
    in_words = ("os error 28", "os error 122")
    return fault_of(error) is FULL or any(
        words in str(each) for each in _chain(error) for words in in_words
    )


def told(error: BaseException) -> str:
    """What an error says, in brief, without the address asked for: it may hold a signature."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    asked = isinstance(status, int) and isinstance(message, str)
    said = redacted(f"{status} {message}" if asked else str(error)) or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _codes(error: BaseException) -> Iterator[str]:
    """What a service answered: botocore has it in a dict, aiohttp and Google's clients beside."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        yield str(response.get("Error", {}).get("Code"))
        yield str(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    for place, name in ((error, "status"), (error, "code"), (response, "status_code")):
        code = getattr(place, name, None)
        if isinstance(code, int | str):
            yield str(code)
