"""Every module can be imported: what the packages installed here lack shows at once."""

from __future__ import annotations

import importlib
import pkgutil

import cwpo_dist


def test_every_module_can_be_imported() -> None:
    names = [found.name for found in pkgutil.walk_packages(cwpo_dist.__path__, "cwpo_dist.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    assert len(names) > 100
