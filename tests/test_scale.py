"""The simulated fleet of benchmarks/scale.py: its model against what is known, and one real run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import ROOT


@pytest.fixture(scope="module")
def scale() -> Any:
    """The benchmark as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import scale
    finally:
        sys.path.pop(0)
    return scale


def test_the_model_has_the_limits_that_queues_have(scale: Any) -> None:
    assert scale.solve(1, 2.0, 0.5, 0.25) == pytest.approx(1 / 2.75)
    assert scale.solve(1000, 2.0, 0.5, 0.25) == pytest.approx(1 / 0.25, rel=1e-3)
    assert scale.solve(8, 2.0, 0.5, 1e-9) == pytest.approx(8 / 2.5, rel=1e-3)


def test_a_fit_finds_what_points_were_made_of(scale: Any) -> None:
    points = [scale.Point(n, s, scale.solve(n, s, 0.05, 0.01), 0.0, {}) for n, s in scale.FITTED]
    overhead, serial = scale.fit(points)
    assert overhead == pytest.approx(0.05, abs=0.005)
    assert serial == pytest.approx(0.01, rel=0.05)


def test_longer_shards_keep_a_fleet_busy_until_preemption_and_the_end_cost_more(scale: Any) -> None:
    fitted = {"overhead_s": 0.01, "serial_s": 0.005}
    short, right, long = (scale.forecast(s, fitted) for s in (5.0, 60.0, 2000.0))
    assert short["driver"] == pytest.approx(5.0 / 4096 / 0.005, rel=0.01)  # the driver's limit
    assert right["driver"] > 0.99
    assert right["with_ends"] > max(short["with_ends"], long["with_ends"])
    # One preemption an hour loses 30 s of a shard and 180 s until another device works.
    kept = right["with_1_preempted"] / right["with_ends"]
    assert kept == pytest.approx(1 - 210 / 3600, abs=0.005)


def test_fake_devices_are_driven_by_the_real_pool(
    scale: Any, tmp_path: Path, ray_local: Any
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules["fake_fleet"])  # workers cannot import it
    point = scale.measured(tmp_path, 8, 0.25, seconds=2.0)
    # How busy is a matter of the machine: above 1 where reports before the look came late.
    assert point.busy > 0
    assert point.rate == pytest.approx(point.busy * 8 / 0.25)
    committed = list((tmp_path / "8-0.25-None" / "scores").glob("part-*.parquet"))
    assert len(committed) >= 64
    assert point.cpu_ms["driver"] > 0
