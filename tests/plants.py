"""Faults to put into the project's code, which random blows must find: the tests of the tests."""

from __future__ import annotations

from cwpo_dist.storage import Store
from cwpo_dist.training.lease import LeaseToken


def overwriting_create() -> None:
    """`create` replaces what is there, and says that it won."""

    def create(self: Store, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True

    Store.create = create  # type: ignore[method-assign]  # planted


def never_refused() -> None:
    """A driver that was followed may go on committing."""
    LeaseToken.check = lambda self: None  # type: ignore[method-assign]  # planted


PLANTS = {"overwriting-create": overwriting_create, "never-refused": never_refused}
