"""Examples, shard by shard, in; rows and numbers that all ranks of a node read from one file, out.

A node makes the file once, on its own disk: `tokens`, the int32 ids of all prompts and answers end
to end, what repeats within a shard once; `pairs`, a record of fixed width a pair: its id, where its
prompt and its answers lie, its numbers; and `left_out.json`. Ranks map them into memory, so that
they share the pages that they read, and a rank by itself holds next to nothing.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from cwpo_dist import __version__
from cwpo_dist.canonical import digest
from cwpo_dist.file_marks import fingerprint
from cwpo_dist.lm.rows import Row
from cwpo_dist.node_disk import shared_data
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import TaskError

FORMAT = 2
ID_BYTES = 32  # `prepare` names a pair by so many hex digits
T = TypeVar("T")


class Example(NamedTuple):
    """A pair to train on.

    Attributes:
        pair_id: its id.
        row: its tokens, the chosen answer first; lists, or anything with a buffer of int32.
        numbers: beside them, in the order of the file's fields.
    """

    pair_id: str
    row: Row
    numbers: tuple[object, ...] = ()


# Counts in its argument the pairs that it leaves out, by reason.
Shards = Callable[[Counter[str]], Iterable[Iterable[Example]]]


class TokenFile:
    """The data of one training, mapped.

    Attributes:
        left_out: how many pairs are not among them, by reason.
    """

    def __init__(self, folder: Path, layout: np.dtype[np.void], in_use: IO[str]) -> None:
        """Maps a folder that stays while the file `in_use` is open."""
        self._in_use = in_use
        # Any: a view of int32 reads like the list of ints that a row has elsewhere.
        self._tokens: Any = _mapped(folder / "tokens", np.dtype(np.int32)).data
        self._pairs = _mapped(folder / "pairs", layout)
        self.left_out: Mapping[str, int] = json.loads((folder / "left_out.json").read_text())

    @property
    def rows(self) -> Sequence[Row]:
        """Tokens of each pair: views of the file, of which nothing is read until they are."""
        return _Lazy(len(self._pairs), self._row)

    @property
    def pair_ids(self) -> Sequence[str]:
        """The id of each."""
        return _Lazy(len(self._pairs), self._pair_id)

    def numbers(self, field: str) -> NDArray[Any]:
        """[N, …] one of the numbers of all pairs; a view of the file."""
        return self._pairs[field]

    def _row(self, i: int) -> Row:
        at = self._pairs[i]
        starts, lengths = at["starts"].tolist(), at["lengths"].tolist()
        spans = zip(starts, lengths, strict=True)
        prompt, *answers = (self._tokens[start : start + length] for start, length in spans)
        return Row(prompt, tuple(answers), tuple(at["skipped"].tolist()))

    def _pair_id(self, i: int) -> str:
        return bytes(self._pairs[i]["pair_id"]).decode()


def content(folder: Store) -> object:
    """What tells a folder of records from another one, and from one that is written anew."""
    with folder.reading():
        return [folder.uri, fingerprint(folder.uri)]


def token_file(
    identity: object, n_answers: int, numbers: Sequence[tuple[Any, ...]], shards: Shards
) -> TokenFile:
    """The data of one training; the first process of a node that asks makes the file.

    Args:
        identity: what decides the content; another one is another file.
        n_answers: of each row.
        numbers: NumPy fields of what belongs to a pair beside its tokens.
        shards: what is written, in its order.

    Raises:
        TaskError: where this node's disk has no room.
    """
    spans = ("starts", "i8", (1 + n_answers,)), ("lengths", "i4", (1 + n_answers,))
    skipped = ("skipped", "i4", (n_answers,))
    layout = np.dtype([("pair_id", f"S{ID_BYTES}"), *spans, skipped, *numbers])
    name = digest([FORMAT, __version__, str(layout.descr), identity])
    try:
        folder, in_use = shared_data(name, partial(_write, layout, shards))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TaskError(
            f"{tempfile.gettempdir()}: no room for the token ids that this node's workers share "
            f"({error.strerror}); make room there, or let TMPDIR name a larger disk"
        ) from error
    return TokenFile(folder, layout, in_use)


def _write(layout: np.dtype[np.void], shards: Shards, folder: Path) -> None:
    left_out: Counter[str] = Counter()
    start = 0
    with (folder / "tokens").open("wb") as tokens, (folder / "pairs").open("wb") as pairs:
        for examples in shards(left_out):
            placed: dict[bytes, int] = {}  # in this shard
            records = []
            for pair_id, row, numbers in examples:
                assert len(pair_id) <= ID_BYTES, pair_id  # NumPy would cut it
                texts = [np.asarray(ids, np.int32).tobytes() for ids in (row.prompt, *row.answers)]
                for text in texts:
                    if text not in placed:
                        placed[text] = start
                        start += len(text) // 4
                        tokens.write(text)
                starts, lengths = [placed[text] for text in texts], [len(t) // 4 for t in texts]
                skipped = row.skipped or (0,) * len(row.answers)
                records.append((pair_id.encode(), starts, lengths, skipped, *numbers))
            pairs.write(np.array(records, layout).tobytes())
    (folder / "left_out.json").write_text(json.dumps(left_out))


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file's numbers; one without any cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


class _Lazy(Sequence[T]):
    """Items that are made when they are asked for."""

    def __init__(self, length: int, item: Callable[[int], T]) -> None:
        self._length, self._item = length, item

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> list[T]: ...

    def __getitem__(self, at: int | slice) -> T | list[T]:
        if isinstance(at, slice):
            return [self._item(i) for i in range(*at.indices(self._length))]
        return self._item(at)
