"""uv's list of all locked packages in; release/{packages,torch*,cuda}.txt and constraints.txt out.

For Linux PyPI has torch for CUDA alone, which wants gigabytes of other packages; PyTorch's CPU
build wants none of them. In one list pip would take PyPI's, whose index tells it the hashes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOR_CUDA = re.compile(r"(nvidia-|cuda-|triton==)")
VERSION = re.compile(r"^(\S+==[^\s\\]+(?: ; [^\\]+?)?) \\$", re.MULTILINE)


def divide(locked: str, torch_cpu: str) -> dict[str, str]:
    """The files' content by name."""
    entries = re.split(
        r"^(?=\S)",
        "".join(line for line in locked.splitlines(keepends=True) if not line.startswith("#")),
        flags=re.MULTILINE,
    )
    entries = [entry for entry in entries if entry.strip()]
    for_cuda = [entry for entry in entries if FOR_CUDA.match(entry)]
    torch = [entry for entry in entries if entry.startswith("torch==")]
    others = [entry for entry in entries if entry not in for_cuda + torch]
    (first,) = torch
    version = first.split(" ", 1)[0]
    return {
        "packages.txt": "".join(others),
        "torch.txt": first,
        "torch-cpu.txt": f"{version}+cpu \\\n    --hash=sha256:{torch_cpu}\n",
        "cuda.txt": "".join(for_cuda),
    }


def main(path: str, torch_cpu: str) -> None:
    """Writes the files."""
    files = divide(Path(path).read_text(), torch_cpu)
    for name, content in files.items():
        (HERE / name).write_text(f"# By `make lock`; not to be edited.\n{content}")
    pinned = VERSION.findall(files["packages.txt"] + files["torch.txt"])
    (HERE.parent / "constraints.txt").write_text("".join(f"{entry}\n" for entry in sorted(pinned)))


if __name__ == "__main__":
    main(*sys.argv[1:])
