"""What Ray says of itself is left out; what a worker of ours says is not."""

from __future__ import annotations

from typing import Any

import pytest

from cwpo_dist.runs import notices


@pytest.mark.parametrize(
    ("actor", "lines", "shown"),
    [
        ("RayTrainWorker", ["loss 1", "loss 2"], ["loss 1", "loss 2"]),
        (None, [f"Actor x {notices.NOT_OURS[0]}", "loss 1"], ["loss 1"]),
        (None, [f"Actor x {notices.NOT_OURS[0]}"], None),
        ("PlacementGroupCleaner", ["Traceback", "ConnectionError: Found multiple"], None),
    ],
)
def test_what_workers_say_is_shown(actor: str | None, lines: list[str], shown: Any) -> None:
    said: list[dict[str, Any]] = []
    notices._without(said.append)({"actor_name": actor, "lines": lines, "pid": 1})
    assert [each["lines"] for each in said] == ([] if shown is None else [shown])
