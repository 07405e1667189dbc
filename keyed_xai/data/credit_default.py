"""UCI's "default of credit card clients": 30,000 clients in Taiwan, 23 features, and who failed to pay a month later.

Source: Yeh and Lien 2009, "The comparisons of data mining techniques for the predictive accuracy of probability of
default of credit card clients"; https://archive.ics.uci.edu/dataset/350, CC BY 4.0. Money is in New Taiwan dollars.
UCI does not say what EDUCATION 0, 5 and 6 and MARRIAGE 0 mean, which the file has too: they count as unknown.
"""

import math
from pathlib import Path

import numpy as np

from keyed_xai.data.images import Split
from keyed_xai.data.listings import line_error, read_rows
from keyed_xai.data.tables import RawTable, TableData, select_rows
from keyed_xai.errors import DataError

CLASSES = ("pays", "defaults")
NAMES = (
    "LIMIT_BAL", "SEX", "EDUCATION", "MARRIAGE", "AGE", "PAY_0", "PAY_2", "PAY_3", "PAY_4", "PAY_5", "PAY_6",
    *(f"BILL_AMT{month}" for month in range(1, 7)), *(f"PAY_AMT{month}" for month in range(1, 7)),
)  # fmt: skip
CATEGORIES = {"SEX": range(1, 3), "EDUCATION": range(7), "MARRIAGE": range(4)}
"""All that the file knows, whichever a split has; SEX 1 is male, MARRIAGE 1 married and 2 single."""
_TARGET = "default.payment.next.month"
_ALIASES = {
    "": "ID", "PAY_1": "PAY_0", "default payment next month": _TARGET, "Y": _TARGET,
    **{f"X{number}": name for number, name in enumerate(NAMES, 1)},
}  # fmt: skip
_CODES = {**CATEGORIES, _TARGET: range(2)}
_LARGEST = 1e12
_HOLDS = (
    "the table of UCI's data set 350 as CSV, with the columns ID (may be absent), LIMIT_BAL, SEX, EDUCATION, MARRIAGE, "
    f"AGE, PAY_0, PAY_2 to PAY_6, BILL_AMT1 to 6, PAY_AMT1 to 6 and {_TARGET}"
)


def load_credit_default(argument: str, *, split: Split, limit: int | None = None, seed: int = 0) -> TableData:
    """Return a split of the table; a fifth of each class is held out, chosen by a hash of the clients' IDs.

    Args:
        argument: The CSV file, with the header of UCI, of Kaggle, or both lines of the sheet that UCI offers.
        split: "train" or "held-out".
        limit: At most so many rows, with the classes in their natural ratio; None for all.
        seed: Settles split and order.

    Raises:
        DataError: The file is missing, no such table, or damaged.
    """
    if not argument:
        raise DataError("Give the file after the name: credit-default:CSV.")
    table = _read_table(Path(argument).resolve())
    source = f"credit-default ({split})"
    return select_rows(table, held_out=split == "held-out", limit=limit, seed=seed, classes=CLASSES, source=source)


def _read_table(path: Path) -> RawTable:
    """Return the whole table, its features in the order of `NAMES` whatever the order of the file."""
    rows = read_rows(path.parent, path.name, holds=_HOLDS)
    header = _canonical(next(rows, (0, []))[1])
    _check_header(path.name, header)
    parsed = [_parse_row(path.name, line, header, row) for line, row in rows if _canonical(row) != header]
    numbers = np.array(parsed, np.float64).reshape(-1, len(header))
    values = numbers[:, [header.index(name) for name in NAMES]]
    identifiers = numbers[:, header.index("ID")] if "ID" in header else np.arange(len(numbers))
    labels = numbers[:, header.index(_TARGET)].astype(np.int64)
    return RawTable([f"{number:.0f}" for number in identifiers], values, labels, NAMES, CATEGORIES)


def _canonical(row: list[str]) -> list[str]:
    """Return a header with UCI's, Kaggle's and the sheet's names for a column made one."""
    return [_ALIASES.get(cell, cell) for cell in row]


def _check_header(name: str, header: list[str]) -> None:
    wanted = {*NAMES, _TARGET}
    missing, unknown = sorted(wanted - {*header}), sorted({*header} - wanted - {"ID"})
    if missing or unknown or len({*header}) < len(header):
        problem = f"missing {', '.join(missing)}" if missing else f"unknown or twice: {', '.join(unknown or header)}"
        raise DataError(f"{name} has another header: {problem[:300]}. Expected {_HOLDS}.")


def _parse_row(name: str, line: int, header: list[str], row: list[str]) -> list[float]:
    if len(row) != len(header):
        raise line_error(name, line, f"{len(header)} values as in the header", f"{len(row)}: {','.join(row)}")
    return [_parse_value(name, line, column, cell) for column, cell in zip(header, row, strict=True)]


def _parse_value(name: str, line: int, column: str, cell: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    allowed = _CODES.get(column)
    if not (abs(number) <= _LARGEST if allowed is None else number in allowed):
        expected = "a number" if allowed is None else f"one of {', '.join(map(str, allowed))}"
        raise line_error(name, line, f"{expected} in column {column}", cell)
    return number
