"""What Ray reserved for this process in; the one device that its model goes to out.

What is there to see does not count: Ray leaves all GPUs of a node visible to an actor that asked
for none, and a GPU that was reserved may have no driver that this torch can use.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import ray
import torch

_DRIVER = Path("/proc/driver/nvidia/version")


class DeviceError(RuntimeError):
    """A GPU was reserved that torch cannot use; the message names the driver and torch."""


def assigned_device() -> torch.device:
    """The GPU that Ray reserved for this actor or task, else the CPU.

    A script without Ray has its machine to itself: there it is a GPU where torch can use one.

    Raises:
        DeviceError: for a reserved GPU without working CUDA: it would be held, and not used.
    """
    usable = torch.cuda.is_available()
    if not ray.is_initialized():
        return torch.device("cuda" if usable else "cpu")
    ids = ray.get_gpu_ids()
    if not ids:
        return torch.device("cpu")
    if not usable:
        built = [("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)]
        made_for = " and ".join(f"{name} {has}" for name, has in built if has) or "the CPU alone"
        raise DeviceError(
            f"Ray reserved GPU {', '.join(map(str, ids))} here, but torch {torch.__version__} "
            f"(made for {made_for}) cannot use it with {driver()}; install a torch and a driver "
            "that fit, or set gpus_per_actor to 0"
        )
    return torch.device("cuda")


def assigned_gpus() -> int:
    """How many GPUs that device stands for.

    Raises:
        DeviceError: as `assigned_device`.
    """
    if assigned_device().type == "cpu":
        return 0
    return len(ray.get_gpu_ids()) if ray.is_initialized() else 1


def hide_other_gpus() -> None:
    """In an actor without a GPU: no library finds one, whatever the node has.

    Before anything of CUDA has started in the process; Ray does the same where some are reserved.
    """
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def use_own_processors() -> None:
    """In an actor with several: its tokenizer uses them, whatever the node's environment says.

    That says `false` for all (cluster/), as processes of one thread share the others.
    """
    processors = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
    if processors > 1:
        os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(processors)}


def fix_workspace() -> None:
    """Has cuBLAS choose the same kernel for the same product each time, as NVIDIA advises.

    Before the first product on a GPU in the process; elsewhere it does nothing.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def driver() -> str:
    """The NVIDIA driver of this machine, in words."""
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", _DRIVER.read_text())
    except OSError:
        return "no NVIDIA driver"
    return f"NVIDIA driver {found[1]}" if found else "an unknown NVIDIA driver"
