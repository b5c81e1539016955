"""A saved folder, a hub split or a folder of files in; its rows or its files, by `datasets`, out.

The only file that imports datasets, which takes most of a second: others import this file where
they meet such a source, and not above, so that no reader of plain files waits for it.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import datasets
import pyarrow as pa
import yaml
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.exceptions import DatasetsError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from cwpo_dist.pairs.readers import BATCH_ROWS, DataSetError, Part


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except DatasetsError as error:
        raise DataSetError(str(error)) from error
    # What `datasets` stumbles over in a stranger's metadata, whose form it does not check.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise DataSetError(f"{type(error).__name__}: {error}") from error


def tables(part: Part, columns: Collection[str] | None) -> Iterator[pa.Table]:
    """The rows of a saved folder or hub split; None: all columns.

    Raises:
        KeyError: for a split that a saved folder lacks.
        OSError, DataSetError: when storage, or the hub, refuses to be read.
    """
    with _in_our_words():
        rows = _open_saved(part) if part.reader == "saved" else _open_hub(part)
        names = [name for name in rows.column_names or [] if columns is None or name in columns]
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


def hub_splits(part: Part) -> Mapping[str, tuple[int, int]]:
    """By split of a hub data set, how many parts it can be read in, and its bytes, 0 if unknown.

    Raises:
        OSError, ValueError: when the hub does not give it.
    """
    with _in_our_words():
        splits: datasets.IterableDatasetDict = _open_hub(part)
        return {
            name: (max(1, int(rows.num_shards)), _bytes(rows, name))
            for name, rows in splits.items()
        }


def _bytes(rows: datasets.IterableDataset, split: str) -> int:
    info = (rows.info.splits or {}).get(split)
    return (info.num_bytes or 0) if info else 0


def _configs(card: str) -> MetadataConfigs:
    try:
        return MetadataConfigs.from_dataset_card_data(DatasetCard(card).data)
    except yaml.YAMLError as error:
        raise DataSetError(f"README.md: its metadata are not valid YAML: {error}") from error


def splits_of_card(card: str, uri: str, name: str | None) -> tuple[str, Mapping[str, list[str]]]:
    """The subset of a folder that its data set card means, and the files of each of its splits.

    Args:
        card: the text of the folder's README.md, with `configs` in its metadata.
        uri: the folder.
        name: the subset; None: the card's default, or its only one.

    Raises:
        OSError, DataSetError: for a card that cannot be followed, naming what it has.
    """
    with _in_our_words():
        configs = _configs(card)
        name = name or configs.get_default_config_name()
        if name not in configs:
            raise DataSetError(
                f"README.md has {'no default subset' if name is None else f'no subset {name!r}'}; "
                f"name one under `name`: {', '.join(configs)}"
            )
        folder = "/".join(filter(None, (glob.escape(uri), configs[name].get("data_dir"))))
        named = configs[name].get("data_files")
        patterns = get_data_patterns(folder) if named is None else sanitize_patterns(named)
        return name, DataFilesDict.from_patterns(patterns, folder)
