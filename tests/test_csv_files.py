"""CSV and TSV: quoted lines are one row, a stray quote loses none, a header names columns once."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_readers import IN_TMP, ROW, faults, write

from cwpo_dist.pairs import csv_files
from cwpo_dist.pairs.readers import read
from cwpo_dist.pairs.rejects import Reason


def test_csv_reads_quoted_lines_and_marks_rows_that_do_not_fit(tmp_path: Path) -> None:
    data = (
        b"prompt,chosen,rejected\r\n"
        b'"two\nlines","a, b","say ""hi"""\r\n'
        b"\r\n"
        b"too,few\r\n"
        b'p,"stray" quote,r\r\n'
        b"p,\xff,r\r\n"
        b"p,c,r\r\n"
    )
    rows = list(read(write(tmp_path / "x.csv", data)))
    assert rows[0].value == {"prompt": "two\nlines", "chosen": "a, b", "rejected": 'say "hi"'}
    assert faults(rows) == [
        (1, None),
        (2, Reason.MALFORMED),
        (3, Reason.MALFORMED),
        (4, None),  # parsing refuses the lone surrogate that stands for the byte
        (5, None),
    ]
    assert rows[1].as_text() == "too,few"
    assert rows[2].as_text() == 'p,"stray" quote,r'
    assert rows[4].value == ROW


def test_tabs_separate_the_fields_of_a_tsv_file(tmp_path: Path) -> None:
    data = b'prompt\tchosen\trejected\na, b\t"two\nlines"\tr\n'
    (row,) = read(write(tmp_path / "x.tsv", data))
    assert row.value == {"prompt": "a, b", "chosen": "two\nlines", "rejected": "r"}


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_semicolons_separate_the_fields_where_the_header_says_so(
    tmp_path: Path, start: bytes
) -> None:
    data = (
        start + b'prompt;"chosen, best";rejected\n"a, b";"two\nlines; of text";r\n' + b"p;c;r\n" * 9
    )
    path = write(tmp_path / "x.csv", data)
    rows = [row.value for row in read(path)]
    assert rows[0] == {"prompt": "a, b", "chosen, best": "two\nlines; of text", "rejected": "r"}
    assert rows[1:] == [{"prompt": "p", "chosen, best": "c", "rejected": "r"}] * 9
    with (tmp_path / "x.csv").open("rb") as file:
        spans = list(csv_files.csv_spans(file, 16))
    assert len(spans) > 2
    found = []
    for begin, end, _ in spans:
        with (tmp_path / "x.csv").open("rb") as file:
            found += [row for row, _ in csv_files.csv_rows(file, (begin, end))]
    assert found == rows


def test_a_header_with_a_comma_keeps_commas(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "x.csv", b"prompt,chosen;x,rejected\np,c;d,r\n"))
    assert row.value == {"prompt": "p", "chosen;x": "c;d", "rejected": "r"}


def test_csv_does_not_lose_the_file_to_one_open_quote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_files, "CSV_FIELD_BYTES", 100)
    data = b'prompt,chosen,rejected\np,"never closed,r\n' + b"p,c,r\n" * 50
    rows = list(read(write(tmp_path / "x.csv", data)))
    assert rows[0].fault is Reason.MALFORMED
    assert sum(row.fault is None for row in rows) >= 30


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'p,"never closed,r', None),
        (b'p,"opened,r', b'p,closed",r'),  # as many fields as there are columns
        (b'p,"opened,r', b'p,"opened again,r'),
        (b'"p,c,r', b'p,c,r"'),
    ],
)
def test_every_line_that_a_stray_quote_takes_counts_as_a_row(
    tmp_path: Path, before: bytes, after: bytes | None
) -> None:
    """Seventy lines behind one are not one row that is set aside, nor one answer of seventy."""
    lost = [before, *[b"p,c,r"] * 70, *([] if after is None else [after])]
    data = b"\n".join([b"prompt,chosen,rejected", b"p,c,r", *lost]) + b"\n"
    if after is not None:
        data += b"p,c,r\n" * 9
    part = write(tmp_path / "x.csv", data)
    rows = list(read(part))
    kept = sum(row.fault is None for row in rows)
    assert len(rows) == data.count(b"\n") - 1
    assert kept == (1 if after is None else 10)
    assert {len(row.value["chosen"]) for row in rows if row.fault is None} == {1}
    with (tmp_path / "x.csv").open("rb") as file:
        assert sum(count for *_, count in csv_files.csv_spans(file, 50)) == len(rows)


def test_lines_within_an_answer_are_no_rows(tmp_path: Path) -> None:
    table = "Cities:\n\na, b\nRome, Paris, and so on, and on\n1, 2, 3"
    data = f'prompt,chosen,rejected\np,"{table}",r\np,"one\n\ntwo\nthree",r\n'.encode()
    rows = list(read(write(tmp_path / "x.csv", data)))
    assert [row.fault for row in rows] == [None, None]
    assert rows[0].value["chosen"] == table


def test_csv_refuses_a_header_that_names_a_column_twice(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "x.csv", b"a,a\n1,2\n"))
    assert row.fault is Reason.DAMAGED
    assert "names a column twice: a, a" in row.as_text()


@IN_TMP
@given(
    rows=st.lists(
        st.tuples(
            *[st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1) for _ in "pcr"]
        ),
        max_size=8,
    )
)
def test_csv_gives_back_what_python_wrote(tmp_path: Path, rows: list[tuple[str, ...]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([tuple(ROW), *rows])
    part = write(tmp_path / "x.csv", text.getvalue().encode())
    assert [tuple(row.value.values()) for row in read(part)] == rows
