"""CSV files of patch features: one line per patch, features first. The layout must be detected."""

import csv
import functools
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from attrs import frozen

_log = logging.getLogger(__name__)

_WIDTHS = (384, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4608)  # of the encoders in use
_MAX_LINE = 2**21  # characters; some 50 times a line of the widest encoder
_MAX_TRAILING = 8  # columns of numbers that may follow the features
_SAMPLE = 8  # lines from which the layout is detected
_BOM = "\xef\xbb\xbf"  # the byte order mark of UTF-8, read as Latin-1


@frozen(kw_only=True)
class CsvLayout:
    """Where the features of a CSV are."""

    has_header: bool
    start: int  # first column of the features
    width: int
    rows: int


def detect_layout(path: Path, dims: int) -> CsvLayout:
    """Count the rows of a CSV and detect which columns are features.

    Args:
        dims: number of features, where numbers follow them; 0: not known.
    Raises:
        ValueError: not a CSV of features, or it does not show which columns are features.
    """
    status = os.stat(path)
    version = (status.st_ino, status.st_size, status.st_mtime_ns)
    return _scan(path, dims, version)


def read_csv_blocks(path: Path, layout: CsvLayout, size: int) -> Iterator[np.ndarray]:
    """The features of a CSV as float32 [c, d], `size` rows at a time.

    Raises:
        ValueError: a cell that is no number, or a line with fewer columns than the first; says which patch.
    """
    columns = range(layout.start, layout.start + layout.width)
    lines = map(_fill_empty_cells, _lines(path))
    if layout.has_header:
        next(lines, None)
    for first in range(0, layout.rows, size):
        block = list(itertools.islice(lines, size))
        try:
            # No comments (None): "#" may be in the text behind the features.
            x = np.loadtxt(block, "<f4", None, ",", usecols=columns, ndmin=2, quotechar='"')
        except ValueError as error:
            # NumPy counts rows of the block that it was given; say which patch of the file it is.
            row, reason = _first_fault(block, columns)
            raise ValueError(f"{path}: patch {first + row} (from 0): {reason}") from error
        if len(x) != len(block):  # a quote that is not closed joins lines
            raise ValueError(
                f"{path}: patches {first} to {first + len(block) - 1} (from 0): "
                f"{len(block)} lines are {len(x)} rows; an open quote?"
            )
        yield x


@functools.lru_cache(maxsize=8192)
def _scan(path: Path, dims: int, _version: tuple[int, int, int]) -> CsvLayout:
    """`detect_layout`, once per version of a file: to count its rows it must be read whole."""
    sample: list[str] = []
    count = 0  # lines so far
    counts_rows = True  # whether the first column has gone up by one with every line so far
    for line in _lines(path):
        if count < _SAMPLE:
            sample.append(line)
        # The first two lines may be a header and row 0 or 1: `_is_index` looks at these.
        if count >= 2 and counts_rows:
            # Its number is count - 1 (below a header, from 0), count, or count + 1 (no header, from 1).
            numbers = (f"{count},", f"{count - 1},", f"{count + 1},")
            counts_rows = line[:16].replace('"', "").startswith(numbers)
        count += 1
    # The first lines, cell by cell, show which columns are features.
    try:
        rows = [*csv.reader(sample)]
    except csv.Error as error:
        raise ValueError(f"{path}: is not a readable CSV ({error})") from error
    first, second = _first_two(rows)
    has_index = counts_rows and _is_index(first, second, count)
    has_header, start, width = _detect_columns(path, dims, rows, has_index)
    if has_index:
        _log.warning(
            "%s: the first column counts the rows: it is an index and no feature, and is left out", path
        )
    return CsvLayout(has_header=has_header, start=start, width=width, rows=max(0, count - has_header))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a CSV that are not empty. Text after the numbers may be in any encoding."""
    with open(path, encoding="latin-1") as file:
        for number in itertools.count(1):
            # With a limit: a file without line ends would otherwise be read into memory as one line.
            line = file.readline(_MAX_LINE)
            if not line:
                return
            if len(line) == _MAX_LINE:
                raise ValueError(
                    f"{path}: line {number} has {_MAX_LINE} characters or more; a line is one patch, "
                    "is this a CSV of features?"
                )
            # A cell with a NUL byte would count as text after the features, and so would all that follow.
            if "\0" in line:
                raise ValueError(f"{path}: line {number} has a NUL byte; the file is damaged")
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield line


def _fill_empty_cells(line: str) -> str:
    """Write "nan" into empty cells, which is how pandas writes NaN."""
    if ",," not in line and line[0] != "," and line.rstrip()[-1] != ",":
        return line  # the regular expression is slow, and few lines need it
    return re.sub(r"(^|,)(?=,|\s*$)", r"\1nan", line)


def _first_fault(lines: Sequence[str], columns: range) -> tuple[int, str]:
    """(row, reason) of the first line that cannot be read as numbers."""
    for row, cells in enumerate(csv.reader(lines)):
        if len(cells) < columns.stop:
            return row, f"must have {columns.stop} columns, found {len(cells)}; was the file cut off?"
        for column in columns:
            if not _is_number(cells[column]):
                return row, f"column {column + 1} must be a number, found {cells[column]!r}"
    return 0, "cannot be read as numbers"


# Layout -------------------------------------------------------------------------------------------------
def _is_index(first: Sequence[str], second: Sequence[str], lines: int) -> bool:
    """Whether the first column, whose cells from the third line on count up, counts rows.

    It then starts 0, 1, 2 or 1, 2, 3, with or without a header above.
    """
    if len(first) < 2:
        return False  # an index alone has no features behind it
    # One or two rows alone do not show it; the width of an encoder plus one column does.
    has_known_width = len(first) - 1 in _WIDTHS
    if lines == 1:
        return first[0] in ("0", "1") and has_known_width
    above, below = first[0].strip(), second[0].strip()
    if below in ("0", "1") and not _is_number(above):  # a header above the first row
        # An empty cell above it is the header of pandas' index.
        return lines > 2 or has_known_width or not above
    # No header. Where the first line counts up itself (0, 1, 2, ...) it is a header of column numbers.
    starts_counting = (above, below) in (("0", "1"), ("1", "2"))
    return starts_counting and _numbered_names(first) < 2


def _detect_columns(
    path: Path, dims: int, rows: Sequence[Sequence[str]], has_index: bool
) -> tuple[bool, int, int]:
    """(there is a header, first column of the features, their number), from the first rows.

    A header numbers its columns or is all text.
    """
    first, second = _first_two(rows)
    # The header of a DataFrame with numbered columns: an empty cell above the index, then 0, 1, ...
    has_pandas_index = len(first) > 1 and not first[0] and first[1] == "0"
    start = int(has_index or has_pandas_index)
    has_header, width = _detect_header(first, second, start)
    if any(first) and not width:
        raise ValueError(
            f"{path}: the features must be the first columns, found {first[0]!r} in the first of {len(first)}"
        )
    expected = dims or _nearest_width(width)
    surplus = width - expected
    may_have_others = bool(expected) and 0 < surplus <= _MAX_TRAILING
    if not dims and width in _WIDTHS:  # a width in use is taken as it is
        may_have_others = False
    if not may_have_others:
        return has_header, start, width

    # Some columns of numbers are no features. Coordinates and row numbers in front cannot be told apart from
    # features by position, but they are whole numbers.
    data = [row[start : start + width] for row in rows[has_header:]]
    whole_in_front = _hold_whole_numbers(data, range(surplus))
    if whole_in_front and not _hold_whole_numbers(data, range(expected, width)):
        raise ValueError(
            f"{path}: has {width} columns of numbers, and the first {surplus} hold whole numbers such as "
            f"{', '.join(data[-1][:surplus])}: row numbers or coordinates, not features; save the table "
            "without them"
        )
    if not dims:
        raise ValueError(
            f"{path}: has {width} columns of numbers; are {surplus} of them not features? Give "
            f"dims={expected} or dims={width}"
        )
    return has_header, start, dims


def _detect_header(first: Sequence[str], second: Sequence[str], start: int) -> tuple[bool, int]:
    """(the first line is a header, how many columns from `start` on are numbers or named as such)."""
    names = first[start:]
    width = _numbered_names(names)
    following = names[width : width + 1]
    # Two or more numbered names that end at text or at the end of the line. Eight of them are a header
    # whatever follows: features do not begin 0, 1, 2, 3, 4, 5, 6, 7.
    if width > 1 and (width >= 8 or not following or not _is_number(following[0])):
        return True, width
    if names and not any(map(_is_number, names)):  # all text: the row below shows how many are numbers
        if second:
            return True, _leading_numbers(second[start:])
        # A header alone: an empty slide, of which only the names can be counted.
        return True, len([name for name in names if name])
    return False, _leading_numbers(names)


def _nearest_width(width: int) -> int:
    """The width of an encoder that a few more columns than features would give; 0 for none."""
    for encoder_width in _WIDTHS:
        if 0 < width - encoder_width <= _MAX_TRAILING:
            return encoder_width
    return 0


def _hold_whole_numbers(data: Sequence[Sequence[str]], columns: range) -> bool:
    """Whether these columns hold whole numbers, not only zeros, in all rows."""
    values = []
    for row in data:
        for column in columns:
            if column >= len(row):  # a shorter line is refused when the features are read
                continue
            if not _is_number(row[column]):
                return False
            values.append(float(row[column]))
    # Columns of zeros only are neither row numbers nor places.
    return any(values) and all(value.is_integer() for value in values)


def _numbered_names(names: Sequence[str]) -> int:
    """How many names from the first on are 0, 1, 2, ... or f0, f1, f2, ... or f1, f2, f3, ..."""
    if not names:
        return 0
    match = re.fullmatch(r"(\D*)(0|1)", names[0].strip())
    if match is None or match.groups() == ("", "1"):  # a bare 1 is a value, not a name
        return 0
    prefix, start = match[1], int(match[2])
    for i, name in enumerate(names):
        if name.strip() != f"{prefix}{start + i}":
            return i
    return len(names)


def _leading_numbers(cells: Sequence[str]) -> int:
    """How many cells from the first on are numbers or empty, without empty ones at the end."""
    count = 0
    for i, cell in enumerate(cells):
        if not cell.strip():  # NaN, if a number follows; else the comma at the end of a line
            continue
        if not _is_number(cell):
            break
        count = i + 1
    return count


def _first_two(rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], Sequence[str]]:
    first, second = [*rows, [], []][:2]
    return first, second


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
