"""Malformed rows and files, seeded, among good ones: none crashes, vanishes or gets through.

Every good row says its number in its prompt, every bad one is made with the reason that must stand
beside it in `rejects/`. What is done to whole files can change a row into another good row; of
those only the accounts are checked.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import pairs, rejects

from cwpo_dist.config import PrepareConfig
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

Row = dict[str, Any]
Case = tuple[bytes, str | None]  # one line and its reason; None: a good row
TEXTS = ("prompt", "chosen", "rejected")
WRONG = [3, -0.5, True, [], {}, ["x"], {"a": {"b": [None]}}, float("nan"), float("inf"), 10**400]
DEEP: Any = "x"
for _ in range(300):
    DEEP = [DEEP]


@dataclass
class Expected:
    """What must come out.

    Attributes:
        good: prompts that must arrive.
        bad: (file, position) → reason.
        torn: files of which a head arrives, and one reject stands for the rest → their prompts.
        loose: files of which anything may arrive, so long as the accounts hold.
        malformed: bad rows and files, together.
    """

    good: set[str] = field(default_factory=set)
    bad: dict[tuple[str, int], str] = field(default_factory=dict)
    torn: dict[str, list[str]] = field(default_factory=dict)
    loose: set[str] = field(default_factory=set)

    @property
    def malformed(self) -> int:
        return len(self.bad) + len(self.torn) + len(self.loose)


class Maker:
    """Rows by a seed; numbers make every good one a pair of its own."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.number = 0

    def good(self) -> Row:
        self.number += 1
        answers = {"chosen": f"yes {self.number} é\u2028", "rejected": "no\r\n\x00\x1b[0m"}
        return {"prompt": f"good {self.number}", **answers}

    def pick(self, *given: Any) -> Any:
        return self.random.choice(given)

    # -- JSON lines, chosen and rejected

    def text_case(self) -> Case:
        row, name = self.good(), self.pick(*TEXTS)
        kind = self.random.randrange(14)
        if kind < 5:
            return _line(row | {name: self.pick(*WRONG, DEEP)}), f"wrong type: {name}"
        if kind == 5:
            row = row | {name: None} if self.pick(True, False) else _without(row, name)
            return _line(row), f"missing field: {name}"
        if kind == 6:
            blank = self.pick("", " \n\t", "\u3000")
            empty = "empty prompt" if name == "prompt" else f"empty answer: {name}"
            return _line(row | {name: blank}), empty
        if kind == 7:
            return _line(row | {"rejected": row["chosen"]}), "identical answers"
        if kind == 8:
            return _line(row | {name: "x\ud800y"}), f"invalid Unicode: {name}"
        if kind == 9:
            return _line(row).replace(b"good", self.pick(b"\xff", b"\xc3", b"\xed\xa0\x80")), (
                "invalid Unicode"
            )
        if kind == 10:
            return self._votes(row)
        if kind == 11:
            return _line(self.pick(*WRONG[:4], "x", None, [row], DEEP)), "not a mapping"
        return self._malformed(row), "malformed line"

    def _votes(self, row: Row) -> Case:
        bad = self.pick(-1, 1.5, "x", 10**9, True, None, float("nan"), [1], 10**400, "١")
        return _line(row | {"votes_a": bad, "votes_b": 1}), "bad votes: votes_a"

    def _malformed(self, row: Row) -> bytes:
        line = _line(row)
        cut = self.random.randrange(1, len(line))
        return self.pick(
            *(line[:cut], line + line, b"[" * 50_000, b"7" * 5000, b"{'prompt': 'x'}", b"\x00"),
            *(line.replace(b"good", b"\x01"), b"\xef\xbb\xbf" + line, line[:-1] + b",}"),
        )

    def text_row(self) -> Case:
        row = self.good()
        if self.random.random() < 0.001:
            row["prompt"] += "x" * 2**20
        extra = self.pick({}, {"junk": DEEP, "n": 10**30}, {"votes_a": "3", "votes_b": 2.0})
        twice = self.pick(b"", b'"chosen": null, ')  # the last of two equal keys counts
        return b"{" + twice + _line(row | extra)[1:], None

    # -- the same with labels, and as conversations

    def label_case(self) -> Case:
        bad = self.pick("c", "AA", 1, True, ["a"], {"a": 1}, 0, 10**400, "\ud800")
        return _line(self._labelled() | {"label": bad}), "bad label value"

    def label_row(self) -> Case:
        return _line(self._labelled() | {"label": self.pick("a", "b", None, "", float("nan"))}), (
            None
        )

    def _labelled(self) -> Row:
        row = self.good()
        return {"prompt": row["prompt"], "response_a": row["chosen"], "response_b": "no"}

    def chat_row(self) -> Case:
        return _line(self._chat()), None

    def _chat(self) -> Row:
        row = self.good()
        asked = {"role": "user", "content": row["prompt"]}
        return {x: [asked, {"role": "assistant", "content": row[x]}] for x in TEXTS[1:]}

    def chat_case(self) -> Case:
        row, name = self._chat(), self.pick("chosen", "rejected")
        last: Any = row[name][-1]
        kind = self.random.randrange(6)
        if kind < 2:
            changes, reason = self.pick(
                ({"role": "robot"}, "unknown role"),
                ({"role": ["user"]}, "unknown role"),
                ({"role": None}, "no message"),
                ({"content": None}, "no content"),
                ({"content": [3]}, "not text"),
                ({"content": {"text": 3}}, "not text"),
                ({"content": 3}, "not text"),
                ({"content": [{"type": "image_url"}]}, "image, sound or video"),
            )
            row[name][-1] = last | changes
            return _line(row), f"{reason}: {name}"
        if kind == 2:
            junk = self.pick(3, {}, [3], [None], [[last]], ["x"], DEEP)
            reason = "wrong type" if junk == 3 else "no message"
            return _line(row | {name: junk}), f"{reason}: {name}"
        if kind == 3:
            row[name][-1] = last | {"role": self.pick("user", "system", "tool")}
            return _line(row), "no assistant turn"
        if kind == 4:
            row[name][0] = {"role": "user", "content": "another"}
            return _line(row), "differing prefixes"
        row[name][-1] = last | {"content": "\udfff"}
        return _line(row), f"invalid Unicode: {name}"

    # -- CSV

    def csv_row(self) -> Case:
        self.number += 1
        return f'good {self.number},"yes\n""{self.number}""",no'.encode(), None

    def csv_case(self) -> Case:
        self.number += 1
        n = self.number
        return self.pick(
            (b"one field", "malformed line"),
            (b"a,b,c,d", "malformed line"),
            (b'p,"stray" quote,r', "malformed line"),
            (f"p {n},,no".encode(), "empty answer: chosen"),
            (f"p {n},yes, ".encode(), "empty answer: rejected"),
            (b",yes,no", "empty prompt"),
            (f"p {n},same,same".encode(), "identical answers"),
            (f"p {n},\xff,no".encode("latin-1"), "invalid Unicode: chosen"),
            (
                f"p {n},yes,{chr(0xD800)}".encode("utf-8", "surrogatepass"),
                "invalid Unicode: reject",
            ),
        )


def _line(value: Any) -> bytes:
    return json.dumps(value).encode()


def _without(row: Row, name: str) -> Row:
    return {key: value for key, value in row.items() if key != name}


class Folder:
    """Writes the sources and keeps what must come of them."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.make = Maker(seed)
        self.random = self.make.random
        self.expected = Expected()

    def lines(self, name: str, good: Callable[[], Case], bad: Callable[[], Case], n: int) -> None:
        """A file of lines, about `n` of them bad; blank lines, CRLF and a BOM among them."""
        path, out = self._new(name), io.BytesIO(b"\xef\xbb\xbf")
        out.seek(3)
        position, is_csv = 0, name.endswith(".csv")
        out.write(b"prompt,chosen,rejected\n" if is_csv else b"")
        for place in range(int(n * 1.3)):
            line, reason = good() if self.random.random() < 0.2 or not place else bad()
            out.write(line + self.random.choice([b"\n", b"\r\n"]))
            position += 1
            self._expect(str(path), position, line, reason)
            if self.random.random() < 0.05:
                out.write(b"\r\n")
                position += not is_csv  # its rows are numbered, not its lines
        path.write_bytes(out.getvalue())

    def _expect(self, path: str, position: int, line: bytes, reason: str | None) -> None:
        if reason is None:
            start = line.index(b"good ")
            digits = line[start + 5 : start + 15]
            number = digits[: next(i for i, c in enumerate(digits) if not chr(c).isdigit())]
            self.expected.good.add(f"good {int(number)}")
        else:
            self.expected.bad[path, position] = reason

    def arrays(self, n: int) -> None:
        """JSON arrays, each broken at its end."""
        for i in range(n):
            path = self._new(f"array/{i:04d}.json")
            row = self.make.good()
            end = self.random.choice([",", "]]", ', {"prompt": ', "", "] x", " 3"])
            path.write_text("[" + json.dumps(row) + end)
            self.expected.good.add(row["prompt"])
            self.expected.bad[str(path), 2] = "malformed line"

    def tables(self, n: int) -> None:
        """Parquet files, each with good rows and one kind of bad ones, `n` of those in all."""
        for i in range(max(1, n // 50)):
            rows = [self.make.good() for _ in range(60)]
            name = self.random.choice(TEXTS)
            column = [row[name] for row in rows]
            array, reason = self._column(i % 6, name, column)
            path = self._new(f"table/{i:04d}.parquet")
            table = {x: [row[x] for row in rows] for x in TEXTS} | {"junk": [{"a": [1]}] * 60}
            if array is None:
                del table[name]
            columns = table if array is None else table | {name: array}
            pq.write_table(pa.table(columns), path, row_group_size=self.random.choice([7, 1000]))
            for k, row in enumerate(rows):
                if k < 10 and array is not None and i % 6 < 3:
                    self.expected.good.add(row["prompt"])
                else:
                    self.expected.bad[str(path), k + 1] = reason

    def _column(self, kind: int, name: str, column: list[str]) -> tuple[Any, str]:
        """The first ten cells stay good for the first three kinds; the others spoil all."""
        head = column[:10]
        if kind == 0:
            return [*head, *[None] * 50], f"missing field: {name}"
        if kind == 1:
            empty = "empty prompt" if name == "prompt" else f"empty answer: {name}"
            return [*head, *[" "] * 50], empty
        if kind == 2:
            cells = [text.encode() for text in head] + [b"\xff\xfe"] * 50
            return pa.array(cells).view(pa.string()), f"invalid Unicode: {name}"
        if kind == 3:
            return None, f"missing field: {name}"
        wrong = self.random.choice([[1.5] * 60, [float("nan")] * 60, [b"x"] * 60, [[1, 2]] * 60])
        return wrong, f"wrong type: {name}"

    def damaged(self, n: int) -> None:
        """Whole files torn at any byte, or with some bytes changed."""
        pack: dict[str, Callable[[bytes], bytes]] = {
            ".jsonl.gz": gzip.compress,
            ".jsonl.bz2": bz2.compress,
            ".jsonl.xz": lzma.compress,
            ".parquet": _as_parquet,
        }
        rows = [self.make.good() for _ in range(3)]
        self._new("damaged/0000.jsonl").write_bytes(b"\n".join(map(_line, rows)))
        self.expected.good |= {row["prompt"] for row in rows}
        for i in range(1, n):
            suffix = self.random.choice(list(pack))
            path = self._new(f"damaged/{i:04d}{suffix}")
            rows = [self.make.good() for _ in range(self.random.randrange(1, 40))]
            torn = self.random.random() < 0.6
            if not torn:  # a changed byte must not make a row of another file of it
                rows = [row | {"prompt": f"loose {row['prompt'][5:]}"} for row in rows]
            data = bytearray(pack[suffix](b"\n".join(map(_line, rows)) + b"\n"))
            if torn:
                del data[self.random.randrange(7, len(data)) :]  # more than a signature
                self.expected.torn[str(path)] = [row["prompt"] for row in rows]
            else:
                for _ in range(self.random.randrange(1, 20)):
                    data[self.random.randrange(len(data))] = self.random.randrange(256)
                self.expected.loose.add(str(path))
            path.write_bytes(bytes(data))
        self._new("damaged/empty.jsonl").write_bytes(b"")
        self._new("damaged/empty.csv").write_bytes(b"")
        for name, data in (("empty.parquet", b""), ("twice.csv", b"a,a\n1,2\n"), ("x.csv", b'"\n')):
            self._new(f"damaged/{name}").write_bytes(data)
            self.expected.torn[str(self.path / "damaged" / name)] = []

    def _new(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _as_parquet(lines: bytes) -> bytes:
    out = io.BytesIO()
    rows = [json.loads(line) for line in lines.splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=5)
    return out.getvalue()


def make_sources(path: Path, seed: int, bad_rows: int, bad_files: int) -> tuple[Any, Expected]:
    """About so many bad rows and files in all formats, and what must come of them."""
    folder = Folder(path, seed)
    make = folder.make
    for i in range(3):
        folder.lines(f"text/{i}.jsonl", make.text_row, make.text_case, bad_rows // 6)
    folder.lines("label/0.jsonl", make.label_row, make.label_case, bad_rows // 20)
    folder.lines("chat/0.jsonl", make.chat_row, make.chat_case, bad_rows // 6)
    folder.lines("csv/0.csv", make.csv_row, make.csv_case, bad_rows // 6)
    folder.tables(bad_rows // 5)
    folder.arrays(bad_files // 5)
    folder.damaged(bad_files)
    sources = [{"path": str(each / "*")} for each in sorted(path.iterdir())]
    given = PrepareConfig(sources=sources, max_reject_fraction=1.0, keep_columns=["junk"])
    return given, folder.expected


def check(config: PrepareConfig, expected: Expected, store: Store) -> None:
    counts = prepare(store, config, seed=0)
    written, set_aside = pairs(store), rejects(store)
    assert counts["rows_in"] == len(written) + counts["merged_duplicates"] + len(set_aside)
    arrived = {row["prompt"][0]["content"].partition("x")[0] for row in written}
    assert expected.good <= arrived
    reasons = {(row["source"], row["position"]): row["reason"] for row in set_aside}
    assert len(reasons) == len(set_aside), "two rejects of one row"
    strict = {at: why for at, why in reasons.items() if at[0] not in expected.loose}
    for path, prompts in expected.torn.items():
        kept = sum(prompt in arrived for prompt in prompts)
        assert arrived.issuperset(prompts[:kept]), "not the head of the file"
        assert strict.pop((path, kept + 1)) == "damaged file"
    assert {at: why[:23] for at, why in strict.items()} == {
        at: why[:23] for at, why in expected.bad.items()
    }
    beyond = arrived - expected.good - {p for torn in expected.torn.values() for p in torn}
    lost = sum(at[0] in expected.loose for at in reasons)
    assert len(beyond) + lost >= len(expected.loose), "a file vanished"
    said = Counter(row["source"] for row in set_aside if row["reason"] == "damaged file")
    assert counts["damaged_files"] == len(said)


@pytest.mark.usefixtures("in_process")
def test_ten_thousand_malformed_rows_and_files(tmp_path: Path) -> None:
    config, expected = make_sources(tmp_path / "in", seed=0, bad_rows=11_000, bad_files=400)
    assert expected.malformed >= 10_000
    check(config, expected, Store(str(tmp_path / "out")))


@pytest.mark.usefixtures("ray_local")
def test_malformed_rows_and_files_on_ray(tmp_path: Path) -> None:
    config, expected = make_sources(tmp_path / "in", seed=1, bad_rows=600, bad_files=40)
    check(config, expected, Store(str(tmp_path / "out")))


@pytest.mark.long
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_more_malformed_rows_and_files(tmp_path: Path, seed: int) -> None:
    config, expected = make_sources(tmp_path / "in", seed, bad_rows=20_000, bad_files=2000)
    check(config, expected, Store(str(tmp_path / "out")))
