"""A saved folder, a hub split or a folder of files in; its rows or its files, by `datasets`, out.

The only file that imports datasets, which takes most of a second: others import this file where
they meet such a source, and not above, so that no reader of plain files waits for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import datasets
import pyarrow as pa
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError

from cwpo_dist.pairs.readers import BATCH_ROWS, DataSetError, Part


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except DatasetsError as error:
        if isinstance(error, OSError):
            raise
        raise DataSetError(str(error)) from error


def tables(part: Part, wanted: Collection[str] | None) -> Iterator[pa.Table]:
    """The rows of a saved folder or hub split; None: all columns.

    Raises:
        KeyError: for a split that a saved folder lacks.
        OSError, DataSetError: when storage, or the hub, refuses to be read.
    """
    with _in_our_words():
        rows = _open_saved(part) if part.reader == "saved" else _open_hub(part)
        names = [name for name in rows.column_names or [] if wanted is None or name in wanted]
        if names:
            rows = rows.select_columns(names)
        yield from rows.with_format("arrow").iter(batch_size=BATCH_ROWS)


def _open_saved(part: Part) -> datasets.Dataset:
    """A folder that `save_to_disk` wrote."""
    saved = datasets.load_from_disk(part.uri)
    return saved[part.split or "train"] if isinstance(saved, datasets.DatasetDict) else saved


def _open_hub(part: Part) -> datasets.IterableDataset:
    """One shard of a hub split, streamed: nothing is copied to the node's disk."""
    rows: datasets.IterableDataset = datasets.load_dataset(
        part.uri,
        part.name,
        data_dir=part.data_dir,
        split=part.split,
        revision=part.revision,
        streaming=True,
    )
    index, count = part.shard
    return rows.shard(num_shards=count, index=index) if count > 1 else rows


def hub_shards(part: Part) -> tuple[int, int]:
    """How many parts a hub split can be read in, and its bytes, 0 where unknown.

    Raises:
        OSError, ValueError: when the hub does not give it.
    """
    with _in_our_words():
        rows = _open_hub(part)
        split = (rows.info.splits or {}).get(part.split)
    return max(1, int(rows.num_shards)), (split.num_bytes or 0) if split else 0


def files_by_split(uri: str) -> Mapping[str, list[str]]:
    """The data files of a folder, as their names and folders tell splits.

    Raises:
        OSError, DataSetError: where there are none.
    """
    with _in_our_words():
        found: Mapping[str, list[str]] = DataFilesDict.from_patterns(get_data_patterns(uri), uri)
    return found
