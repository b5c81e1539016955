"""The environment in; whether this cluster brings nodes when something waits for them, out."""

from __future__ import annotations

import os


def grows() -> bool:
    """True under KubeRay's autoscaler, which starts Ray without its own monitor."""
    return "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")
