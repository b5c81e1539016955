"""A process out: told apart from any other on any host, so that one can say that it is gone."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Process:
    """A process, told apart from any other: also from one that reuses its id.

    Attributes:
        host: its host name.
        boot: the host's boot id and the process namespace; ids mean something within one only.
        pid: its process id.
        started: its start, in clock ticks since boot.
    """

    host: str
    boot: str
    pid: int
    started: int

    @classmethod
    def current(cls) -> Self:
        """The calling process."""
        return cls(socket.gethostname(), _boot(), os.getpid(), started(os.getpid()))

    @property
    def machine(self) -> str:
        """Its host, boot and namespace in eight letters, for a file's name."""
        return hashlib.sha256(f"{self.host}\0{self.boot}".encode()).hexdigest()[:8]

    def is_dead_here(self) -> bool:
        """True when it surely is gone: its id, which means something here, is free or reused."""
        return self._ids_mean_something() and started(self.pid) != self.started

    def lives_here(self) -> bool:
        """True when it surely is alive: on this host, and so by this host's clock."""
        known = self.started != -1
        return self._ids_mean_something() and known and started(self.pid) == self.started

    def _ids_mean_something(self) -> bool:
        return self.host == socket.gethostname() and self.boot == _boot()


def started(pid: int) -> int:
    """The start of a living process in clock ticks since boot; -1 where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def _boot() -> str:
    """The boot id and process namespace; empty where the system has none to tell (not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
