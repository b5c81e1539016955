"""One rank's stretches of flattened parameters in, a safetensors file out; any range back in.

A file holds one flat fp32 tensor for the parameters and one for each optimizer state: stretches of
all parameters, one after another. Its header lists them, so a rank of another world size, or of
another ZeRO stage, seeks to the numbers that it keeps and reads no others, on any filesystem.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cwpo_dist.storage import StorageError, Store

PARAMETERS = "parameters"
_STRETCHES = "stretches"
_READ_BYTES = 1 << 26  # at most so many at once, whatever the parameter's size
_LONGEST_HEADER = 1 << 28


class DamagedShard(ValueError):
    """A file that is not whole; the message names it and the remedy."""


@dataclass(frozen=True)
class Share:
    """Numbers of one flattened parameter, or of a state of it, that a rank keeps.

    Attributes:
        name: of the parameter.
        start: the place of the first of them in the flattened parameter.
        values: [n] in fp32; a view: what is written into it, the rank keeps.
    """

    name: str
    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        """The place after the last of them."""
        return self.start + self.values.numel()

    def part(self, rank: int, world_size: int) -> Share:
        """Of what all ranks keep alike: the part that one of them writes."""
        size = -(-self.values.numel() // world_size)
        first = min(rank * size, self.values.numel())
        return Share(self.name, self.start + first, self.values[first : first + size])


@dataclass(frozen=True)
class Shard:
    """What one rank writes: a copy on the CPU, so that training can go on.

    Attributes:
        stretches: name, start and length of each stretch, in the order of the tensors.
        tensors: by key ('parameters' or a state), each flat, all of one length.
    """

    stretches: list[tuple[str, int, int]]
    tensors: dict[str, Tensor]

    @classmethod
    def copied(cls, shares: Mapping[str, Iterable[Share]]) -> Shard:
        """The shares of each key, in the same order for all keys."""
        stretches: list[tuple[str, int, int]] = []
        tensors = {}
        for key, given in shares.items():
            kept = list(given)
            stretches = [(share.name, share.start, share.values.numel()) for share in kept]
            size = sum(length for *_, length in stretches)
            tensors[key] = torch.empty(size, dtype=torch.float32)
            place = 0
            for share, (*_, length) in zip(kept, stretches, strict=True):
                tensors[key][place : place + length].copy_(share.values)
                place += length
        return cls(stretches, tensors)

    def write(self, folder: Store, name: str) -> None:
        """Writes the file; when this returns, it is on the disk or in the object store.

        Raises:
            StorageError: when storage refuses it.
        """
        if folder.is_local:  # nobody reads the folder before its commit
            with folder.in_place(name) as path:
                self._save(path)
            return
        with tempfile.TemporaryDirectory(prefix="cwpo-checkpoint-") as scratch:
            self._save(Path(scratch) / name)
            folder.copy_in(Path(scratch) / name, name)

    def _save(self, path: Path) -> None:
        try:
            save_file(self.tensors, path, metadata={_STRETCHES: json.dumps(self.stretches)})
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"checkpoint: cannot write {path}: {error}. The checkpoint before stays; free "
                "space, then run the same command again"
            ) from error


@dataclass(frozen=True)
class ShardFile:
    """A file that a rank wrote; reading it raises `DamagedShard` where it is not whole.

    Attributes:
        store: its folder.
        name: of the file.
    """

    store: Store
    name: str

    def fill(self, key: str, shares: Mapping[str, Share]) -> Counter[str]:
        """Copies what the file holds of the shares (by parameter) into them.

        Args:
            key: 'parameters', or an optimizer state.
            shares: what the calling rank keeps.

        Returns:
            How many numbers of each parameter were copied.
        """
        overlaps = list(self._overlaps(shares))
        if not overlaps:
            return Counter()
        header, data = self._header
        begin = data + int(header[key]["data_offsets"][0])
        with self._open() as file:
            for overlap in overlaps:
                file.seek(begin + overlap.place * 4)
                _read_into(overlap.target, file)
        return Counter({overlap.name: overlap.target.numel() for overlap in overlaps})

    def _overlaps(self, shares: Mapping[str, Share]) -> Iterator[_Overlap]:
        place = 0
        for name, start, length in self.stretches:
            share = shares.get(name)
            if share is not None:
                first, last = max(start, share.start), min(start + length, share.stop)
                if first < last:
                    target = share.values[first - share.start : last - share.start]
                    yield _Overlap(name, place + first - start, target)
            place += length

    @cached_property
    def stretches(self) -> list[tuple[str, int, int]]:
        """Name, start and length of each stretch that it holds."""
        found: list[tuple[str, int, int]] = json.loads(self._header[0]["__metadata__"][_STRETCHES])
        return found

    @cached_property
    def _header(self) -> tuple[dict[str, Any], int]:
        """The parsed header, and where the data begin (the safetensors format)."""
        with self._open() as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(min(size, _LONGEST_HEADER)))
                ends = [at["data_offsets"][1] for key, at in header.items() if key[0] != "_"]
            except ValueError:  # of other bytes than UTF-8, too
                ends = []
            if not ends or file.seek(0, os.SEEK_END) != 8 + size + max(ends):
                raise DamagedShard(
                    f"{self.store.path(self.name)} is damaged, or was cut short; remove its "
                    "checkpoint, and an older one is taken"
                )
            return header, 8 + size

    def _open(self) -> AbstractContextManager[IO[bytes]]:
        return self.store.opened(self.name)


@dataclass(frozen=True)
class _Overlap:
    """Numbers of a parameter in a file, from `place` on in its tensor, and where they go."""

    name: str
    place: int
    target: Tensor


def _read_into(target: Tensor, file: IO[bytes]) -> None:
    for piece in target.split(_READ_BYTES // 4):
        data = file.read(piece.numel() * 4)
        piece.copy_(torch.frombuffer(bytearray(data), dtype=torch.float32))
