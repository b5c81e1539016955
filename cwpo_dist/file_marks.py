"""What files are known by without reading them: a rerun sees by it that an input has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec

from cwpo_dist import local_files

# What tells two versions of a file apart: on S3, GCS and Azure, on disks and by SFTP, on the hub,
# GitHub, WebHDFS and FTP.
_STAMPS = ("ETag", "etag", "md5Hash", "mtime", "blob_id", "sha", "modificationTime", "modify")

Mark = list[str | int | None]  # of one file: its name, size, and etag or mtime


def fingerprint(uri: str) -> list[Mark]:
    """What identifies a file or folder without reading it: [name, size, etag or mtime] a file.

    Raises:
        FileNotFoundError: where there is none.
    """
    filesystem, root = fsspec.url_to_fs(uri)
    start = len(root.rstrip("/"))
    found = [path for path in filesystem.find(root) if not local_files.is_partial(path[start:])]
    if not found:
        raise FileNotFoundError(f"no file at {uri!r}")
    return [mark(path, filesystem.info(path)) for path in sorted(found)]


def mark(path: str, info: Mapping[str, Any]) -> Mark:
    """[name, size, etag or mtime] of one file, from what its filesystem says of it."""
    stamp = next((info[name] for name in _STAMPS if info.get(name)), None)
    return [str(path), info.get("size"), str(stamp)]
