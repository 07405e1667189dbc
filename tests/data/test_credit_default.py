"""UCI credit default: headers, damage, the split, and the encoding against a slow twin."""

import os

import numpy as np
import pytest

from keyed_xai.data.credit_default import NAMES
from keyed_xai.errors import DataError
from tests.clients import HEADER, TARGET, clients, load, make_rows, write


def test_encoded_columns_name_where_they_came_from(table):
    data = load(table)
    assert len(data.columns) == 33
    assert data.names == NAMES
    assert [data.names[group] for group in data.groups] == [column.partition("=")[0] for column in data.columns]
    is_category = np.array(["=" in column for column in data.columns])
    assert data.mean[is_category].tolist() == [0] * 13
    assert data.std[is_category].tolist() == [1] * 13
    assert data.classes == ("pays", "defaults")
    assert data.source == "credit-default (train)"
    assert not data.multi_label


CODED = ["X" + str(number) for number in range(1, 24)]
HEADERS = {
    "uci": ["ID", *NAMES, "default payment next month"],
    "pay_1": [{"PAY_0": "PAY_1"}.get(name, name) for name in HEADER],
    "codes": ["ID", *CODED, "Y"],
    "spaces": [f" {name} " for name in HEADER],
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_other_sources_give_the_same_data(table, tmp_path, name):
    other = load(write(tmp_path / "other.csv", header=HEADERS[name]))
    assert np.array_equal(other.features, load(table).features)
    assert other.columns == load(table).columns


def test_both_header_lines_of_the_sheet_are_read(table, tmp_path):
    rows = [HEADERS["uci"], *make_rows()]
    sheet = load(write(tmp_path / "sheet.csv", rows, ["", *CODED, "Y"]))
    assert np.array_equal(sheet.features, load(table).features)


def test_decimals_quotes_order_mark_and_blank_lines_are_read(table, tmp_path):
    lines = table.read_text().splitlines()
    lines[1:] = [",".join(f'"{value}.0"' for value in line.split(",")) for line in lines[1:]]
    (tmp_path / "other.csv").write_text("\n\n".join(lines), encoding="utf-8-sig")
    assert np.array_equal(load(tmp_path / "other.csv").features, load(table).features)


def test_columns_in_another_order_and_without_ids_are_put_in_order(table, tmp_path):
    rows = [row[:0:-1] for row in make_rows()]
    other = load(write(tmp_path / "other.csv", rows, HEADER[:0:-1]))
    assert other.columns == load(table).columns
    assert len(other) == 48
    by_client = {client: row.tolist() for client, row in zip(clients(other), other.features, strict=True)}
    both = set(by_client) & set(clients(load(table)))
    assert len(both) > 20
    raw = {row[0]: row[6] for row in make_rows()}
    pay = other.columns.index("PAY_0")
    assert all(by_client[c][pay] * other.std[pay] + other.mean[pay] == pytest.approx(raw[c], abs=1e-5) for c in both)


def test_link_to_the_file_is_followed(table, tmp_path):
    (tmp_path / "links").mkdir()
    os.symlink(table, tmp_path / "links" / "credit.csv")
    assert len(load(tmp_path / "links" / "credit.csv")) == 48


DAMAGE = {
    "no number": (3, "AGE", "old", r"credit\.csv, line 5: expected a number in column AGE, got 'old'"),
    "missing": (0, "LIMIT_BAL", "", r"line 2: expected a number in column LIMIT_BAL, got ''"),
    "not finite": (0, "BILL_AMT3", "nan", r"line 2: expected a number in column BILL_AMT3"),
    "infinite": (0, "PAY_AMT1", "inf", r"line 2: expected a number in column PAY_AMT1"),
    "far too large": (0, "PAY_AMT1", "1e300", r"line 2: expected a number in column PAY_AMT1"),
    "unknown category": (5, "SEX", 3, r"line 7: expected one of 1, 2 in column SEX, got '3'"),
    "part of a category": (5, "MARRIAGE", 1.5, r"line 7: expected one of 0, 1, 2, 3 in column MARRIAGE"),
    "third label": (9, TARGET, 2, r"line 11: expected one of 0, 1 in column default\.payment\.next\.month, got '2'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_value_is_named_with_line_and_column(tmp_path, damage):
    index, column, value, message = DAMAGE[damage]
    rows = make_rows()
    rows[index][HEADER.index(column)] = value
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "credit.csv", rows))


@pytest.mark.parametrize("width", [-1, 1])
def test_row_of_another_length_is_named(tmp_path, width):
    rows = make_rows()
    rows[2] = rows[2][:-1] if width < 0 else [*rows[2], 7]
    with pytest.raises(DataError, match=rf"line 4: expected 25 values as in the header, got '{25 + width}: 3,"):
        load(write(tmp_path / "credit.csv", rows))


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ([*HEADER[:5], "YEARS", *HEADER[6:]], "missing AGE"),
        ([*HEADER, "BONUS"], "unknown or twice: BONUS"),
        ([*HEADER, "AGE"], "unknown or twice"),
        ([], "missing AGE"),
    ],
)
def test_other_header_is_refused_with_what_is_expected(tmp_path, header, problem):
    with pytest.raises(DataError, match=rf"credit\.csv has another header: {problem}.*PAY_2 to PAY_6"):
        load(write(tmp_path / "credit.csv", header=header))


def test_missing_file_and_argument_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv is missing: expected the table of UCI"):
        load(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="credit-default:CSV"):
        load("")


def test_oversized_file_is_refused(table, monkeypatch):
    monkeypatch.setattr("keyed_xai.data.listings.LARGEST_TEXT", 1000)
    with pytest.raises(DataError, match=r"credit\.csv has over 1000 bytes"):
        load(table)


def test_limit_below_one_is_refused(table):
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        load(table, limit=0)
