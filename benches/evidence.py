"""How many altered numbers the evidence catches: `python -m benches.evidence FOLDER [--first 100 --pages 100]`.

Test pages are drawn clean, as a scan and as a photograph, and read by OCR. Their gold fields stand for a model's answer, in
which one number of ten is altered: a digit changed, dropped or doubled, the decimal point moved, or another number of the page
and of the same kind (another row's) put in its place. An altered number is caught where `check_fields` does not say
"verified" or "same"; in running text, where it is among `unshown`. Beside them, answers that leave out one row and give its
number to the row above, and answers in which the value of a test is a limit of its own range. An unaltered value that is
not verified is a false alarm. Intervals of 95 % are by bootstrap of whole pages.

Words are kept in FOLDER, so that a second run takes a minute. Reading takes about 3 seconds a page on one core.
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import evolve

from medvl.base.display import track
from medvl.documents.evidence import check_fields
from medvl.documents.fields import Fields, leaves
from medvl.documents.locate import find_places
from medvl.documents.quantities import parse_quantity, same_number
from medvl.documents.read_page import read_page_once
from medvl.documents.words import Word
from medvl.evaluation import metrics
from medvl.phantoms.pages import DAMAGES, PageConfig, draw_page

SHARE = 0.1  # of the numbers that are altered
ALTERATIONS = ("digit changed", "digit dropped", "digit doubled", "point moved", "another row's")
NUMBERS = (
    "value",
    "dose",
    "low",
    "high",
    "age",
    "record",
)  # leaves that are numbers; those of the text beside
KINDS = ("patient", "diagnoses", "medications", "labs", "vitals", "procedures", "text")
COLUMNS = (  # counts of a page, and what each is a share of
    *(("caught of the altered numbers", "altered"), ("  of fields", "altered fields")),
    *((f"  {name}", f"altered, {name}") for name in ALTERATIONS),
    ("altered and standing elsewhere on the page", "altered"),
    ("  caught of these", "altered and standing elsewhere on the page"),
    ("altered and similar", "altered"),
    ("caught of numbers of a row left out", "rows left out"),
    *((f"  of {name}", f"rows left out of {name}") for name in ("labs", "medications", "vitals")),
    ("caught of values that are a limit", "limits as values"),
    ("  the limit itself not verified", "limits as values"),
    ("false alarms of the unaltered values", "unaltered"),
    *((f"  {name}", f"unaltered, {name}") for name in KINDS),
    *((f"  because {name}", "unaltered") for name in ("similar", "elsewhere", "missing")),
    ("false alarms of numbers in running text", "unaltered numbers in running text"),
)


def alter(number: str, others: Sequence[str], gen: np.random.Generator) -> tuple[str, str]:
    """(another number, which of ALTERATIONS): one that is not equal to `number`.

    Args:
        others: numbers of the same kind on the page.
    """
    while True:
        how = ALTERATIONS[int(gen.integers(len(ALTERATIONS)))]
        digits = [i for i, letter in enumerate(number) if letter.isdigit()]
        i = digits[int(gen.integers(len(digits)))]
        new = number
        if how == "digit changed":
            new = number[:i] + str(gen.integers(10)) + number[i + 1 :]
        elif how == "digit dropped" and len(digits) > 1:
            new = (number[:i] + number[i + 1 :]).strip(".")
        elif how == "digit doubled":
            new = number[:i] + number[i] + number[i:]
        elif how == "point moved":
            plain = number.replace(".", "")
            new = f"{plain[:i]}.{plain[i:]}" if 0 < i < len(plain) and "/" not in number else number
        elif how == "another row's" and others:
            new = others[int(gen.integers(len(others)))]
        old, changed = parse_quantity(number), parse_quantity(new)
        is_equal = old is not None and changed is not None and same_number(old, changed)
        if new != number and not is_equal:
            return new, how


def alter_page(fields: Fields, gen: np.random.Generator) -> tuple[Fields, dict[str, tuple[str, str]]]:
    """Fields with some numbers altered, and (new number, how) by path; a number of the text is "text/WORD"."""
    values = leaves(fields)
    altered: dict[str, tuple[str, str]] = {}
    for path, value in values.items():
        name = path.rpartition("/")[2]
        if name in NUMBERS and re.search(r"\d", value) and gen.random() < SHARE:
            alike = [other for key, other in values.items() if key.endswith(f"/{name}")]
            altered[path] = alter(value, [other for other in alike if other != value], gen)
            fields = with_value(fields, path, altered[path][0])
    words = fields.text.split(" ")
    for i, word in enumerate(words):
        number = word.strip(".,")
        if re.fullmatch(r"\d+(\.\d+)?", number) and gen.random() < SHARE:
            others = [other.strip(".,") for other in words if re.fullmatch(r"\d+(\.\d+)?[.,]?", other)]
            altered[f"text/{i}"] = alter(number, [other for other in others if other != number], gen)
            words[i] = word.replace(number, altered[f"text/{i}"][0])
    return evolve(fields, text=" ".join(words)), altered


def with_value(fields: Fields, path: str, value: str) -> Fields:
    """Fields with another value at a path such as "labs/0/value"."""
    section, *rest = path.split("/")
    if section == "patient":
        return evolve(fields, patient=evolve(fields.patient, **{rest[0]: value}))
    rows = list(getattr(fields, section))
    rows[int(rest[0])] = evolve(rows[int(rest[0])], **{rest[1]: value})
    return evolve(fields, **{section: rows})


def count_page(fields: Fields, words: Sequence[Word], gen: np.random.Generator) -> Counter[str]:
    """The counts of COLUMNS for one altered answer, with their denominators and the seconds that checking took."""
    answer, altered = alter_page(fields, gen)
    start = time.perf_counter()
    evidence = check_fields(answer, [words])
    counts = Counter[str](seconds=time.perf_counter() - start, checked=1)
    by_path = {value.path: value for value in evidence.values}
    unshown = Counter(by_path["text"].unshown) if "text" in by_path else Counter[str]()
    for path, (number, how) in altered.items():
        in_text = path.startswith("text/")
        is_caught = unshown[number] > 0 if in_text else not by_path[path].verified
        unshown[number] -= in_text
        stands = find_places(Fields(procedures=[number]), words)["procedures/0"]
        names = ["altered", f"altered, {how}", *([] if in_text else ["altered fields"])]
        counts.update(names)
        if is_caught:
            counts["caught of the altered numbers"] += 1
            counts[f"  {how}"] += 1
            counts["  of fields"] += not in_text
        if stands is not None and stands.spelling == "exact":
            counts["altered and standing elsewhere on the page"] += 1
            counts["  caught of these"] += is_caught
        counts["altered and similar"] += not in_text and by_path[path].status == "similar"
    if "text" in by_path:
        counts["unaltered numbers in running text"] += len(re.findall(r"\d+(?:\.\d+)?", fields.text)) - sum(
            path.startswith("text/") for path in altered
        )
        counts["false alarms of numbers in running text"] += (+unshown).total()
    text_altered = any(path.startswith("text/") for path in altered)
    for path, value in by_path.items():
        if path in altered or (path == "text" and text_altered):
            continue
        kind = path.split("/")[0]
        counts.update(["unaltered", f"unaltered, {kind}"])
        if not value.verified:
            counts.update(["false alarms of the unaltered values", f"  {kind}", f"  because {value.status}"])
    return counts


def count_left_out(fields: Fields, words: Sequence[Word], gen: np.random.Generator) -> Counter[str]:
    """The counts of answers in which a row, one of each list, is left out and the row above has its number."""
    counts = Counter[str]()
    for section, name in (("labs", "value"), ("medications", "dose"), ("vitals", "value")):
        rows = list(getattr(fields, section))
        if len(rows) < 2:
            continue
        i = int(gen.integers(len(rows) - 1))
        number = getattr(rows.pop(i + 1), name)
        if not number or number == getattr(rows[i], name):
            continue
        rows[i] = evolve(rows[i], **{name: number})
        evidence = check_fields(evolve(fields, **{section: rows}), [words])
        counts.update(["rows left out", f"rows left out of {section}"])
        if f"{section}/{i}/{name}" in evidence.unverified:
            counts.update(["caught of numbers of a row left out", f"  of {section}"])
    return counts


def count_limits(fields: Fields, words: Sequence[Word], gen: np.random.Generator) -> Counter[str]:
    """The counts of an answer in which the value of a test is the lower or upper limit of its own range."""
    swaps = []
    for i, lab in enumerate(fields.labs):
        value = parse_quantity(lab.value)
        for name in ("low", "high"):
            limit = parse_quantity(getattr(lab, name))
            if value is not None and limit is not None and not same_number(value, limit):
                swaps.append((f"labs/{i}/value", f"labs/{i}/{name}", getattr(lab, name)))
    if not swaps:
        return Counter()
    value_path, limit_path, number = swaps[int(gen.integers(len(swaps)))]
    evidence = check_fields(with_value(fields, value_path, number), [words])
    counts = Counter[str]({"limits as values": 1})
    counts["caught of values that are a limit"] += value_path in evidence.unverified
    counts["  the limit itself not verified"] += limit_path in evidence.unverified
    return counts


def print_table(tables: dict[str, list[Counter[str]]]) -> None:
    """A row for each of COLUMNS, a column for each damage."""
    print(f"{'':46}" + "".join(f"{f'{damage} (pages {len(rows)})':>26}" for damage, rows in tables.items()))
    for what, whole in COLUMNS:
        cells = []
        for rows in tables.values():
            table = np.array([[row[what], row[whole]] for row in rows], np.float64)
            cells.append(rate_of(table))
        print(f"{what:46}" + "".join(f"{cell:>26}" for cell in cells))
    for name in ("altered", "rows left out", "limits as values", "unaltered"):
        cells = [str(sum(row[name] for row in rows)) for rows in tables.values()]
        print(f"{f'number of {name} ones':46}" + "".join(f"{cell:>26}" for cell in cells))
    total = sum((row for rows in tables.values() for row in rows), Counter[str]())
    print(f"checking a page takes {1000 * total['seconds'] / total['checked']:.1f} ms")


def rate_of(table: np.ndarray) -> str:
    """Sum of the first column by sum of the second, with its interval by bootstrap of rows [n, 2]."""
    if not table[:, 1].sum():
        return "-"

    def of_sums(rows, _, weights):
        sums = rows.sum(0, keepdims=True) if weights is None else weights.T @ rows
        rate = metrics.ratio(sums[:, :1], sums[:, 1:])
        return {"": rate[0] if weights is None else rate}

    pages = [str(i) for i in range(len(table))]
    gen = torch.Generator().manual_seed(0)
    c = metrics.bootstrap(of_sums, table, np.zeros_like(table), pages, n=1000, gen=gen)[""]
    return f"{c.value[0]:.3f} [{c.low[0]:.3f}, {c.high[0]:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where words are kept")
    parser.add_argument("--first", type=int, default=100, help="number of the first page")
    parser.add_argument("--pages", type=int, default=100, help="of each damage")
    parser.add_argument("--draws", type=int, default=5, help="altered answers of each page")
    args = parser.parse_args()
    if args.pages < 2:
        parser.error("--pages must be 2 or more: intervals are over pages")
    tables: dict[str, list[Counter[str]]] = {damage: [] for damage in DAMAGES}
    for number in track(range(args.first, args.first + args.pages), "reading pages"):
        for damage in DAMAGES:
            page = draw_page(PageConfig(), "test", number, damage=damage)
            words = read_page_once(page.image, args.folder)
            total = Counter[str]()
            for draw in range(args.draws):
                gen = np.random.default_rng([number, draw])
                total.update(count_page(page.fields, words, gen))
                total.update(count_left_out(page.fields, words, gen))
                total.update(count_limits(page.fields, words, gen))
            tables[damage].append(total)
    print_table(tables)


if __name__ == "__main__":
    main()
