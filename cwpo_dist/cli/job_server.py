"""The address of a Ray job server in; a client of that one, whatever the environment says, out."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

CONNECT_S = 10.0
# Where Ray's client looks for its server before it looks at what it is given, and for hosts that
# it reaches without a proxy.
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
NO_PROXY = ("no_proxy", "NO_PROXY")


class SubmitError(RuntimeError):
    """The cluster cannot be reached, or refuses a job; the message says what to do."""


@contextmanager
def job_server(address: str) -> Iterator[JobSubmissionClient]:
    """A client, whose failures become one clear message.

    Args:
        address: such as http://127.0.0.1:8265.

    Raises:
        SubmitError: within seconds where nothing answers there; also for what the server refuses.
    """
    try:
        _dial(address)
        with _no_other_address(address):
            yield JobSubmissionClient(address)
    except BrokenPipeError:  # whoever reads what we print has gone: Ray's client has its own errors
        raise
    except OSError as error:  # the connection, also where it went while we followed a job
        raise SubmitError(f"{_no_server(address)} ({error})") from error
    except AuthenticationError as error:
        raise SubmitError(
            f"--address: {address} wants Ray's token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file that its nodes use"
        ) from error
    except SubmitError:
        raise
    except RuntimeError as error:  # how Ray's client reports any other refusal, 404 included
        raise SubmitError(f"{address}: {error}") from error


def other_cluster(address: str) -> str | None:
    """What the environment names, where that is another cluster than the one that is used.

    Args:
        address: of the job server that is used.

    Raises:
        SubmitError: where that is none.
    """
    used, _ = _parsed(address)
    for name in ADDRESSES:
        value = os.environ.get(name, "")
        try:
            there = urlsplit(value if "://" in value else f"//{value}")
        except ValueError:  # no address at all, and so another one
            return f"{name}={value}"
        # Ray's own port is another one than that of the same cluster's job server.
        same_port = not there.scheme.startswith("http") or there.netloc == used.netloc
        if value not in {"", "auto", "local"} and not (
            there.hostname == used.hostname and same_port
        ):
            return f"{name}={value}"
    return None


@contextmanager
def _no_other_address(address: str) -> Iterator[None]:
    """An environment in which nothing leads Ray's client elsewhere.

    It would take an address from there rather than the one that it is given, and would send its
    requests to a proxy, though we have just connected without one.
    """
    before = {name: os.environ.get(name) for name in (*ADDRESSES, *NO_PROXY)}
    direct = [before["no_proxy"] or before["NO_PROXY"], urlsplit(address).hostname]
    _set(dict.fromkeys(ADDRESSES) | dict.fromkeys(NO_PROXY, ",".join(filter(None, direct))))
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _dial(address: str) -> None:
    """Returns when a web server answers there; Ray's client would wait for it without an end."""
    url, port = _parsed(address)
    host = str(url.hostname)
    if url.scheme == "https":  # its certificates are the client's matter
        socket.create_connection((host, port), CONNECT_S).close()
        return
    connection = HTTPConnection(host, port, timeout=CONNECT_S)
    try:
        connection.request("GET", "/api/version")
        connection.getresponse()  # whatever it says
    except HTTPException as error:
        raise ConnectionError(f"what answers is not a web server: {error!r}") from error
    finally:
        connection.close()


def _parsed(address: str) -> tuple[SplitResult, int]:
    try:
        url = urlsplit(address)
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError:  # a port that is no number
        url, port = urlsplit(""), 0
    if url.scheme not in {"http", "https"} or url.hostname is None:
        raise SubmitError(
            f"--address: {address!r} is not the address of a job server; give http://HEAD:8265"
        )
    return url, port


def _no_server(address: str) -> str:
    proxy = getproxies().get(urlsplit(address).scheme)
    return (
        f"--address: no Ray job server answers at {address}; start one (`ray start --head`), open "
        "its port (8265), or forward it: ssh -L 8265:127.0.0.1:8265 HEAD"
        + (f". It is asked directly, not through the proxy {proxy}" if proxy else "")
    )
