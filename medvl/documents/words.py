"""Words of a page with their places: lines in reading order, the cells of a line, and all of it as text."""

import bisect
import statistics
from collections.abc import Iterable, Sequence

from attrs import frozen

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the page


@frozen
class Word:
    """A piece of text on a page.

    Attributes:
        score: how sure the reader is, from 0 to 1.
    """

    text: str
    box: Box
    score: float = 1.0

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def join_boxes(boxes: Iterable[Box]) -> Box:
    """The smallest box around others."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def part_of_box(word: Word, start: int, stop: int) -> Box:
    """The part of a word's box that its characters from `start` to `stop` take, all of them equally wide."""
    left, top, right, bottom = word.box
    width = (right - left) / len(word.text)
    return left + start * width, top, left + stop * width, bottom


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, from 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


# Reading order ----------------------------------------------------------------------------------------------
def lines_of(words: Sequence[Word]) -> list[list[Word]]:
    """Words as lines from top to bottom, each from left to right.

    Lines may be tilted, as they are on a scan or a photograph, by up to about 5 degrees. What stands side by
    side is one line, also across columns: the rows of tables and forms.
    """
    slopes = _slopes_of(words)
    middle = statistics.mean(word.centre[0] for word in words) if words else 0.0
    lines = list[list[Word]]()
    for word in sorted(words, key=lambda word: word.box[0]):
        nearest = None
        smallest = 0.6  # of the height: about half a line away
        slope = _slope_at(slopes, word.centre[1])
        for line in lines:
            distance = _distance(line[-1], word, slope)
            # Boxes of a reader may overlap a little.
            is_right = word.box[0] > line[-1].box[2] - 0.5 * line[-1].height
            if distance < smallest and is_right:
                nearest, smallest = line, distance
        if nearest is None:
            lines.append([word])
        else:
            nearest.append(word)

    def level(line: list[Word]) -> float:
        # Where the line crosses the middle of the page.
        heights = []
        for word in line:
            x, y = word.centre
            heights.append(y + _slope_at(slopes, y) * (middle - x))
        return statistics.mean(heights)

    return sorted(lines, key=level)


def _slopes_of(words: Sequence[Word]) -> list[tuple[float, float]]:
    """(height on the page, how far a line falls there per pixel to the right) of words and their right neighbours."""
    slopes = list[tuple[float, float]]()
    by_level = sorted(words, key=lambda word: word.centre[1])
    levels = [word.centre[1] for word in by_level]
    for word in words:
        # No neighbour is higher or lower: the others need not be tried.
        first = bisect.bisect_left(levels, word.centre[1] - word.height)
        last = bisect.bisect_right(levels, word.centre[1] + word.height)
        near = [other for other in by_level[first:last] if other is not word and _is_neighbour(word, other)]
        if near:
            other = min(near, key=lambda other: other.box[0])
            (x, y), (other_x, other_y) = word.centre, other.centre
            slopes.append((y, (other_y - y) / (other_x - x)))
    return slopes


def _slope_at(slopes: Sequence[tuple[float, float]], y: float) -> float:
    """The median of the slopes that are nearest in height: in a photograph lines are not parallel."""
    nearest = sorted(slopes, key=lambda slope: abs(slope[0] - y))[:15]
    return statistics.median(slope for _, slope in nearest) if nearest else 0.0


def _is_neighbour(word: Word, other: Word) -> bool:
    """Whether `other` follows `word` with the space between two words of a sentence, roughly on its height."""
    gap = other.box[0] - word.box[2]
    height = min(word.height, other.height)
    is_level = abs(other.centre[1] - word.centre[1]) < 0.4 * height
    return is_level and -0.5 * height < gap < height and other.centre[0] > word.centre[0]


def _distance(last: Word, word: Word, slope: float) -> float:
    """How far a word is above or below the line that ends with `last`, in heights of a word."""
    x, y = last.centre
    expected = y + slope * (word.centre[0] - x)
    return abs(word.centre[1] - expected) / ((last.height + word.height) / 2)


def cells_of(line: Sequence[Word]) -> list[Word]:
    """The cells of a line: words with a space between them are one, a wider gap begins the next."""
    return [join_words(words) for words in words_of_cells(line)]


def words_of_cells(line: Sequence[Word]) -> list[list[Word]]:
    """The words of each cell of a line."""
    cells = list[list[Word]]()
    for word in line:
        if cells and word.box[0] - cells[-1][-1].box[2] < _CELL_GAP * word.height:
            cells[-1].append(word)
        else:
            cells.append([word])
    return cells


_CELL_GAP = 1.3  # of the height of a word: a space is a third to four fifths of it


def join_words(words: Sequence[Word]) -> Word:
    """Words of a line as one, as sure as the least sure of them."""
    text = " ".join(word.text for word in words)
    return Word(text, join_boxes(word.box for word in words), min(word.score for word in words))


def words_as_text(words: Sequence[Word]) -> str:
    """The words line by line, as they are put into prompts; two spaces part the cells of a line."""
    rows = list[str]()
    for line in lines_of(words):
        rows.append("  ".join(cell.text for cell in cells_of(line)))
    return "\n".join(rows)
