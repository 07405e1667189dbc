"""Text files that describe a data set: lists of images, labels, tables. They are untrusted, and so kept small."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from keyed_xai.data.decode import leads_out
from keyed_xai.errors import DataError

LARGEST_TEXT = 32 * 2**20
"""Bytes; the largest file of the known data sets has 8 MiB."""
LONGEST_LINE = 10_000
"""Characters that a line may have, at most."""
_LONGEST_NAME = 255
_SHOWN = 80


def read_text(folder: Path, name: str, *, holds: str) -> str:
    """Return a text file of a data set's folder.

    Args:
        folder: The data set's folder.
        name: The file, relative to the folder.
        holds: What the file should hold, for the message when it is missing.

    Raises:
        DataError: The file is missing, a link out of the folder, too large, or not UTF-8.
    """
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} is missing: expected {holds}.")
    if leads_out(folder, path):
        raise DataError(f"{path} is a link out of {folder}: links are followed inside only. Copy the file instead.")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_TEXT + 1)
        if len(data) > LARGEST_TEXT:
            raise DataError(f"{path} has over {LARGEST_TEXT} bytes: expected {holds}.")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Expected {holds}.") from error


def read_lines(folder: Path, name: str, *, holds: str) -> Iterator[tuple[int, str]]:
    """Yield the numbers and contents of the lines that are not blank; arguments and errors as of `read_text`."""
    for number, line in enumerate(_split_lines(folder, name, holds), 1):
        if line.strip():
            yield number, line.strip()


def read_rows(folder: Path, name: str, *, holds: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line numbers and stripped cells of a CSV file's rows that are not blank; otherwise as `read_lines`."""
    rows = csv.reader(_split_lines(folder, name, holds))
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield rows.line_num, cells
    except csv.Error as error:
        raise DataError(f"{name}, line {rows.line_num}: {error}. Expected {holds}.") from error


def line_error(name: str, number: int, expected: str, found: str) -> DataError:
    """Return the error for a line that is not as it should be; what was found is shown shortened."""
    return DataError(f"{name}, line {number}: expected {expected}, got {found[:_SHOWN]!r}. Fetch the file again.")


def is_inside(name: str) -> bool:
    """Return whether a name that a list gives is one of a file below the list's folder, and not absolute or upwards."""
    parts = PurePosixPath(name).parts
    plain = name.isprintable() and len(name.encode()) <= _LONGEST_NAME and not set(name) & set("\\:")
    return bool(parts) and plain and ".." not in parts and parts[0] != "/"


def check_folders(root: Path, folders: Iterable[str]) -> None:
    """Check that folders, given relative to the data set's, are not links out of it.

    Raises:
        DataError: One is.
    """
    real = root.resolve()
    for folder in sorted(set(folders)):
        if not (root / folder).resolve().is_relative_to(real):
            hint = "links are followed inside only. Copy the folder instead."
            raise DataError(f"{root / folder} is a link out of {root}: {hint}")


def _split_lines(folder: Path, name: str, holds: str) -> Iterator[str]:
    """Yield lines with their ends, none of them so long that it cannot be of such a file."""
    for number, line in enumerate(io.StringIO(read_text(folder, name, holds=holds), newline=""), 1):
        if len(line) > LONGEST_LINE:
            raise line_error(name, number, f"a line of at most {LONGEST_LINE} characters", line)
        yield line
