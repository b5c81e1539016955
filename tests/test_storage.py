"""Folders on a disk and on S3: one writer wins, files are whole, and refusals are clear."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from s3fs.core import S3File, S3FileSystem

from cwpo_dist.canonical import digest, parquet_bytes, to_json
from cwpo_dist.file_marks import fingerprint
from cwpo_dist.node_disk import staged, upload
from cwpo_dist.storage import StorageError, Store
from cwpo_dist.training.lease import Lease, LeaseHeld


def test_what_is_created_is_read_back(store: Store) -> None:
    assert store.create("a/one.txt", b"one")
    assert store.read("a/one.txt") == b"one"
    assert store.exists("a/one.txt")
    assert not store.exists("a/two.txt")
    assert store.child("a").read("one.txt") == b"one"
    with pytest.raises(FileNotFoundError):
        store.read("a/two.txt")


def test_the_first_to_create_wins_and_the_second_is_told(store: Store) -> None:
    assert store.create("manifest.json", b"first")
    assert not store.create("manifest.json", b"second")
    assert store.read("manifest.json") == b"first"


def test_write_replaces(store: Store) -> None:
    store.write("report.html", b"old")
    store.write("report.html", b"new")
    assert store.read("report.html") == b"new"


def test_names_are_sorted_relative_and_below(store: Store) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt"):
        store.create(name, b"x")
    assert store.names() == ["a.txt", "b/10.txt", "b/2.txt"]
    assert store.names("b") == ["b/10.txt", "b/2.txt"]


def test_another_writers_file_is_seen_although_we_listed_before(store: Store) -> None:
    store.create("a.txt", b"x")
    assert store.names() == ["a.txt"]
    Store(store.uri).create("b.txt", b"x")
    assert store.exists("b.txt")
    assert store.names() == ["a.txt", "b.txt"]


def test_a_folder_that_comes_while_it_is_listed_is_no_file(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs asks twice where it finds nothing: then another may have begun to write there."""
    info = S3FileSystem._info

    async def late(self: S3FileSystem, path: str, *given: object, **named: object) -> object:
        await self._pipe_file(f"{path}/late.txt", b"x")
        return await info(self, path, *given, **named)

    monkeypatch.setattr(S3FileSystem, "_info", late)
    for below in ("", "scores"):
        assert s3_store.names(below) == []
    assert s3_store.names() == ["late.txt", "scores/late.txt"]


def test_of_many_writers_at_once_exactly_one_wins(store: Store) -> None:
    payloads = [f"writer {i}".encode() * 1000 for i in range(8)]
    with ThreadPoolExecutor(len(payloads)) as pool:
        won = list(pool.map(lambda data: Store(store.uri).create("commit", data), payloads))
    assert won.count(True) == 1
    assert store.read("commit") == payloads[won.index(True)]


def test_a_file_whose_reply_was_lost_is_ours(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client asks again, and then its own file is in the way."""
    put = S3FileSystem._pipe_file

    async def again(self: S3FileSystem, path: str, *given: object, **named: object) -> object:
        await put(self, path, *given, **named)
        return await put(self, path, *given, **named)

    monkeypatch.setattr(S3FileSystem, "_pipe_file", again)
    with Lease.acquire(s3_store) as lease:
        assert lease.token.epoch == 1
        assert s3_store.claim_json("commit", {"by": "me"})
        assert not s3_store.claim_json("commit", {"by": "another"})
        assert not s3_store.create("commit", b"of any writer"), "two might be told that they won"
        with pytest.raises(LeaseHeld):
            Lease.acquire(s3_store)


def _create_many(uri: str, mark: bytes, barrier: object, results: object) -> None:
    store = Store(uri)
    barrier.wait()  # type: ignore[attr-defined]  # multiprocessing's proxies have no types
    wins = [i for i in range(40) if store.create(f"shard-{i:03d}", mark)]
    results.put((mark, wins))  # type: ignore[attr-defined]  # as above


def test_two_racing_processes_share_the_wins_without_a_double(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    writers = [
        context.Process(target=_create_many, args=(store.uri, mark, barrier, results))
        for mark in (b"A" * 4096, b"B" * 4096)
    ]
    for writer in writers:
        writer.start()
    wins = dict(results.get(timeout=60) for _ in writers)
    for writer in writers:
        writer.join()
    assert sorted(index for won in wins.values() for index in won) == list(range(40))
    for mark, won in wins.items():
        assert all(store.read(f"shard-{index:03d}") == mark for index in won)


def test_remove_takes_a_file_or_a_folder_and_minds_nothing_missing(store: Store) -> None:
    store.create("a/1", b"x")
    store.create("a/2", b"x")
    store.create("b", b"x")
    store.remove("a")
    store.remove("a")
    store.remove("b")
    assert not store.exists("a/1")
    assert not store.exists("b")


def test_a_table_comes_back_and_has_the_same_bytes_every_time(store: Store) -> None:
    table = pa.table({"pair_id": ["x", "y"], "score_a": pa.array([0.5, None], pa.float32())})
    assert store.create_table("scores/part-00000.parquet", table)
    assert store.read_table("scores/part-00000.parquet").equals(table)
    only = store.read_table("scores/part-00000.parquet", columns=["pair_id"])
    assert only.column_names == ["pair_id"]
    assert parquet_bytes(table) == parquet_bytes(table)


def test_of_a_large_table_only_the_columns_asked_for_are_fetched(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).bytes(8 * 2**20).hex()
    texts = [noise[i : i + 2**20] for i in range(0, len(noise), 2**20)]
    ids = [f"id-{i}" for i in range(len(texts))]
    s3_store.names()  # what was listed before a file came must not hide it
    s3_store.create_table("pairs.parquet", pa.table({"prompt": texts, "pair_id": ids}))
    fetched: list[int] = []
    fetch = S3File._fetch_range

    def counted(file: S3File, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return bytes(fetch(file, start, end))

    monkeypatch.setattr(S3File, "_fetch_range", counted)
    whole = s3_store.filesystem.size(s3_store.path("pairs.parquet"))
    assert s3_store.read_table("pairs.parquet", ["pair_id"])["pair_id"].to_pylist() == ids
    assert sum(fetched) < whole / 20, "the prompts came too"
    fetched.clear()
    assert s3_store.read_table("pairs.parquet", ["prompt"])["prompt"].to_pylist() == texts
    assert sum(fetched) > whole / 2
    with pytest.raises(pa.ArrowInvalid, match="nothing"):
        s3_store.read_table("pairs.parquet", ["nothing"])
    with pytest.raises(FileNotFoundError):
        s3_store.read_table("none.parquet", ["pair_id"])


def test_a_folder_is_uploaded_and_staged_whole(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "adapter" / "weights.bin").write_bytes(b"\0" * 100)
    upload(folder, store.child("model"))
    copy = staged(store.child("model"))
    assert (copy / "config.json").read_text() == "{}"
    assert (copy / "adapter" / "weights.bin").read_bytes() == b"\0" * 100


def test_a_store_travels_to_another_process(store: Store) -> None:
    store.create("a", b"x")  # its filesystem, with locks and sockets, is open by now
    again = pickle.loads(pickle.dumps(store))  # noqa: S301  # our own bytes
    assert again == store
    assert again.read("a") == b"x"


def test_a_fingerprint_follows_the_content(store: Store) -> None:
    store.write("data/a.jsonl", b"1\n")
    store.write("data/b.jsonl", b"2\n")
    before = fingerprint(store.child("data").uri)
    assert fingerprint(f"{store.uri}/data/a.jsonl") == before[:1]
    assert [entry[1] for entry in before] == [2, 2]
    wait_for_another_stamp()
    store.write("data/b.jsonl", b"3\n")
    after = fingerprint(store.child("data").uri)
    assert after[0] == before[0]
    assert after[1] != before[1]
    with pytest.raises(FileNotFoundError, match="no file at"):
        fingerprint(f"{store.uri}/data/c.jsonl")


def wait_for_another_stamp() -> None:
    """Disks may stamp two writes within some milliseconds alike."""
    time.sleep(0.05)


def test_a_killed_writer_leaves_no_file_to_be_seen(tmp_path: Path) -> None:
    """Killed between the bytes and the link: nothing is listed, and the next writer succeeds."""
    code = (
        "import os, signal, sys; from cwpo_dist.storage import Store\n"
        "os.link = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store(sys.argv[1]).create('part.parquet', b'x' * 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    store = Store(str(tmp_path))
    assert list(tmp_path.iterdir()), "the partial file shows that the writer was at work"
    assert store.names() == []
    assert not store.exists("part.parquet")
    assert store.create("part.parquet", b"y")
    assert store.names() == ["part.parquet"]
    store.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["part.parquet"]


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.create("kept", b"x")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for write in (store.create, store.write):
        assert_refused(write, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert store.read("kept") == b"x"


def assert_refused(write: Callable[[str, bytes], object], reason: str) -> None:
    with pytest.raises(StorageError) as caught:
        write("big", b"data")
    message = str(caught.value)
    for part in ("refused to write", "big", reason, "free space or fix permissions"):
        assert part in message


def test_a_forbidden_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write anywhere: let the system call refuse

        def forbid(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "mkdir", forbid)
    else:
        tmp_path.chmod(0o500)
    assert_refused(Store(str(tmp_path / "run")).create, "Permission denied")


def test_a_folder_whose_name_a_file_has_is_no_file_that_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert_refused(Store(str(tmp_path / "run")).create, "File exists")


def test_a_bucket_that_is_not_there_is_told(s3_server: str) -> None:
    with pytest.raises(StorageError, match="refused to write"):
        Store("s3://no-such-bucket/run").create("a", b"x")


def test_equal_values_have_equal_keys_and_others_do_not() -> None:
    assert digest({"a": 1, "b": [2, "é"]}) == digest({"b": [2, "é"], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest(None)) == 16
    assert to_json({"b": 1, "a": 2}) == b'{\n "a": 2,\n "b": 1\n}\n'


def test_where_nothing_can_be_written_is_said_beforehand(tmp_path: Path) -> None:
    Store(str(tmp_path / "not" / "yet" / "there")).check()
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    for uri, why in (
        (f"{tmp_path}/file/run", "nothing can be written"),
        ("nosuch://bucket/run", "a URI of a known kind"),
        *((uri, "nothing can be kept there") for uri in ("memory://run", "https://host/run")),
        *((uri, "nothing can be kept there") for uri in ("simplecache::s3://b/run", "data:,run")),
    ):
        with pytest.raises(StorageError, match=why):
            Store(uri).check()


def test_a_service_that_does_not_know_us_is_told(
    s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kind of error its client raises."""
    import s3fs

    def refused(*_: object, **__: object) -> bool:
        raise LookupError("no credentials")

    monkeypatch.setattr(s3fs.S3FileSystem, "exists", refused)
    with pytest.raises(StorageError, match=r"LookupError: no credentials\. Check its name"):
        Store("s3://bucket/run").check()


def test_what_another_wrote_since_we_listed_is_read(s3_store: Store) -> None:
    """The S3 client keeps listings, and looks a file's length up in them."""
    import s3fs

    s3_store.write("folder/a", b"1")
    assert s3_store.filesystem.ls(s3_store.path("folder"))  # which is kept
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.pipe_file(s3_store.path("folder/b"), b"2")
    assert not s3_store.create("folder/b", b"3")
    assert s3_store.read("folder/b") == b"2"
