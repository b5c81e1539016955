"""RAY_ADDRESS in; a connection to Ray, or within seconds the reason why there is none, out."""

from __future__ import annotations

import logging
import os
import socket
import sys
from urllib.parse import urlsplit

import grpc
import ray

from cwpo_dist.ray_internals import head_of_this_machine, stop_handler_kept
from cwpo_dist.runs.notices import leave_out, quieten_ray

ANSWER_S = 5.0  # for a head that is there; Ray itself would wait for many minutes
# What Ray adds to its folder for the socket of its object store, and what the system allows.
SESSION = "/ray/session_2026-01-31_23-59-59_000000_{pid}/sockets/plasma_store"
LONGEST = 103 if sys.platform == "darwin" else 107


# Of worker processes where Ray is started here: a thread each, as they share the cores; and memory
# of GPUs in pieces that grow, as batches differ in size. Clusters set the same (cluster/).
WORKERS = {"OMP_NUM_THREADS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


class ClusterError(RuntimeError):
    """No Ray to connect to; the message names the variable, its value and the remedy."""


def named_cluster() -> str | None:
    """The cluster that RAY_ADDRESS names (a submitted job's own); None: Ray is started here."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in {"", "local"} else address


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS, else starts Ray here; at once where that is done already.

    Raises:
        ClusterError: where nothing answers as Ray's head does, or this machine's Ray cannot start.
    """
    quieten_ray()
    if ray.is_initialized():
        return
    address = named_cluster()
    refuse_unreachable(address)
    settings = {name: os.environ.get(name, value) for name, value in WORKERS.items()}
    # Elsewhere Ray's nodes, or the job, have their own.
    environment = None if address is not None else {"env_vars": settings}
    try:
        with stop_handler_kept():
            ray.init(
                address=address or "local", logging_level=logging.WARNING, runtime_env=environment
            )
    except Exception as error:  # of a node that starts too slowly Ray raises just this
        text = " ".join(str(error).split())
        if address is None:
            raise ClusterError(f"Ray does not start on this machine: {text}") from error
        raise ClusterError(
            f"RAY_ADDRESS: {address}: Ray is there, but does not accept this program: {text}"
        ) from error
    leave_out()


def refuse_unreachable(address: str | None) -> None:
    """Returns where Ray's head answers, or where Ray can be started here.

    Args:
        address: RAY_ADDRESS; None: Ray would be started here.

    Raises:
        ClusterError: otherwise.
    """
    if address is None:
        _refuse_long_folder()
    elif address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS: {address} is a job server's address, which `cwpo submit` takes as "
            "--address; give HEAD:6379, or unset it to start Ray on this machine"
        )
    elif wrong := _no_head(address):
        raise ClusterError(
            f"RAY_ADDRESS: no Ray head answers at {address} ({wrong}); start one (`ray start "
            "--head`), open its port (6379), or unset RAY_ADDRESS to start Ray on this machine"
        )


def _no_head(address: str) -> str:
    """Why nothing can be joined there; empty: something answers as Ray's head does."""
    try:
        if address == "auto":
            address = head_of_this_machine()
        there = urlsplit(address if "://" in address else f"//{address}")
        if there.hostname is None or there.port is None:
            return "it is not HOST:PORT"
        socket.create_connection((there.hostname, there.port), ANSWER_S).close()
    except (OSError, ValueError) as error:  # ValueError: of a port that is no number
        return str(error)
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return ""  # whoever listens answers nobody without a certificate
    target = there.netloc.rpartition("@")[2]
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            return f"something listens, but does not answer as Ray does within {ANSWER_S:.0f} s"
    return ""


def _refuse_long_folder() -> None:
    """Ray puts sockets into its folder, whose paths the system keeps short."""
    named = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if named is None:
        return
    folder = os.environ[named]
    left = LONGEST - len(SESSION.format(pid=os.getpid()))
    if len(os.fsencode(folder)) > left:
        raise ClusterError(
            f"{named}: {folder!r} has {len(os.fsencode(folder))} bytes, and Ray's sockets allow "
            f"{left}; set RAY_TMPDIR to a shorter folder, such as /tmp"
        )
