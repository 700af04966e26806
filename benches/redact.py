"""What is left on drawn pages after they were redacted: `python -m benches.redact FOLDER [--pages 50] [--dicoms 10]`.

Test pages of other seeds than the rules were tried on, each damage in turn: what is left of names, dates, record
numbers and ages over 89 is counted against the drawn values and their boxes, not against what the rules found. A value
is visible where less than 95 % of the core of its box is black, and readable where the last reading still shows it.
DICOM files are made of further pages, with a header in which names and numbers are planted everywhere. Letters are what
is harder: running text, names with a title, with a first name only, and with nothing that says that they are names.

Results are kept in FOLDER, so that a run that was stopped goes on. A page takes about 6 seconds on one core.
"""

import argparse
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image

from benches.read_pages import edit_distance
from medvl.base.display import track
from medvl.documents import text_page
from medvl.documents.read_page import read_page
from medvl.documents.redact import Redacted, redact_page
from medvl.documents.redact_dicom import redact_dicom
from medvl.documents.words import Box, Word
from medvl.language.images import open_image
from medvl.phantoms import page_records
from medvl.phantoms.page_records import pick
from medvl.phantoms.pages import Page, PageConfig, draw_page

KINDS = ("name", "date", "record", "age")
# Words that a rule may take with a name, an age or an address.
OF_PEOPLE = ["Dr", "Dr.", "Mrs", "MD", "RN", "daughter", "a", "year", "old", "Oak", "Street,", "IL", "62704"]
LETTERS = (
    "Re: {first} {last}, DOB {date}\n{number} Oak Street, Springfield IL 62704\n\nDear Dr. {doctor},\n\nthank you for "
    "referring {first}, a {age}-year-old retired teacher whom I saw on {seen}. Mrs {last} lives with her daughter {other} "
    "and can be called at {phone}. Her pressure was 142/80 mmHg on lisinopril 10 mg daily.\n\nYours sincerely,\n"
    "{signed} {doctor}, MD",
    "CONSULTATION\n\n{last}, {first}   Hospital no: {record}\nSeen {seen} at the request of Dr {doctor}.\n\nThis is a "
    "{age} year old with shortness of breath. {first} takes furosemide 40 mg and has a creatinine of 1.4 mg/dL. "
    "{other} {last} was present. Please send results to {mail} or fax {phone}.\n\nElectronically signed by: {signed} "
    "{doctor}",
    "NURSING NOTE {seen}\n\n{first} {last} slept well. Family ({other}, {phone}) visited. Weight 71 kg, temperature 36.8. "
    "Potassium 4.1 mmol/L, range 3.5-5.1. MRN {record}. Dr. {doctor} informed. Next visit {date}.\n\n{signed} {other}, RN",
)
SEED = 2026


def sought_values(page: Page) -> dict[str, str]:
    """What must not be left on a page, by kind: its patient, and the age if it is over 89."""
    values = {kind: getattr(page.fields.patient, kind) for kind in KINDS}
    if int(values["age"] or 0) <= 89:
        values["age"] = ""
    return {kind: value for kind, value in values.items() if value and f"patient/{kind}" in page.boxes}


def is_visible(black: np.ndarray, box: Box) -> bool:
    """Whether less than 95 % of the core of a box, the middle half of its height, is black."""
    left, top, right, bottom = box
    margin = (bottom - top) / 4
    core = black[int(top + margin) : int(bottom - margin) + 1, int(left) : int(right) + 1]
    return bool(core.size) and bool(core.mean() < 0.95)


def is_readable(kind: str, value: str, words: Sequence[Word]) -> bool:
    """Whether a part of a name, with at most one wrong letter in five, or all digits of a number are among words."""
    texts = ["".join(filter(str.isalnum, word.text)).casefold() for word in words]
    if kind != "name":
        digits = "".join(filter(str.isdigit, value))
        return len(digits) > 3 and digits in "".join(filter(str.isdigit, " ".join(texts)))
    parts = value.replace(",", " ").casefold().split()
    return any(edit_distance(part, text) <= len(part) // 5 for part in parts for text in texts)


def measure(page: Page, image: Image.Image, redacted: Redacted, words: Sequence[Word]) -> dict[str, Any]:
    """One line of the results; `image` is what was written, `words` those of the last reading."""
    black = (np.asarray(image) < 8).all(-1)
    values = sought_values(page)
    boxes = {kind: page.boxes[f"patient/{kind}"] for kind in KINDS if f"patient/{kind}" in page.boxes}
    # Sex and ages up to 89 may stay; the words of labels and of all else should.
    private = [boxes[kind] for kind in values]
    others = [word for word in page.texts if not any(_is_within(word.box, box) for box in private)]
    hidden = [word.text for word in others if _share_black(black, word.box) > 0.5]
    return {
        "damage": page.damage,
        "visible": {kind: is_visible(black, boxes[kind]) for kind in values},
        "readable": {kind: is_readable(kind, value, words) for kind, value in values.items()},
        "left": len(redacted.left),
        "readings": redacted.readings,
        "others": len(others),
        "hidden": len(hidden),
        "labels": sum(text.endswith(":") for text in hidden),
    }


def _is_within(inner: Box, outer: Box) -> bool:
    x, y = (inner[0] + inner[2]) / 2, (inner[1] + inner[3]) / 2
    return outer[0] - 2 <= x <= outer[2] + 2 and outer[1] - 2 <= y <= outer[3] + 2


def _share_black(black: np.ndarray, box: Box) -> float:
    left, top, right, bottom = map(int, box)
    return float(black[top:bottom, left:right].mean()) if right > left and bottom > top else 0.0


def redacted_page(number: int) -> dict[str, Any]:
    page = draw_page(PageConfig(seed=SEED), "test", number)
    words = list[list[Word]]()

    def read(image: Image.Image) -> list[Word]:
        words.append(read_page(image))
        return words[-1]

    redacted = redact_page(page.image, read=read)
    return measure(page, redacted.image, redacted, words[-1])


# Letters ----------------------------------------------------------------------------------------------------
def redacted_letter(number: int, is_given: bool = False) -> dict[str, Any]:
    """Of the values that fill a letter, those that the last reading still has.

    Args:
        is_given: the names are given, as by `--known`.
    """
    gen = np.random.default_rng([SEED, number])
    people = page_records.words()["people"]
    names = {name: pick(gen, people["first"]) for name in ("first", "other", "signed")}
    names |= {name: pick(gen, people["last"]) for name in ("last", "doctor")}
    dates = [
        f"{gen.integers(1, 29)} March {gen.integers(2001, 2026)}",
        f"{gen.integers(10, 13)}/21/{gen.integers(1930, 1960)}",
    ]
    numbers = {
        "record": str(gen.integers(10**6, 10**7)),
        "phone": f"(555) {gen.integers(200, 999)}-{gen.integers(1000, 9999)}",
    }
    values = names | numbers | {"seen": dates[0], "date": dates[1], "age": str(gen.integers(90, 100))}
    values |= {"number": str(gen.integers(10, 99)), "mail": f"{names['other'].casefold()}@example.org"}
    text = LETTERS[number % len(LETTERS)].format(**values)
    known = [("name", name) for name in names.values()] if is_given else []
    (lines,) = text_page.page_lines(text)
    words = list[list[Word]]()

    def read(image: Image.Image) -> list[Word]:
        words.append(read_page(image))
        return words[-1]

    redacted = redact_page(text_page.draw_text_page(lines, 1, 1), known, read=read)
    left = " ".join(word.text for word in words[-1])
    printed = {kind: value for kind, value in values.items() if value in text and kind != "number"}
    kept = [
        word
        for word in text.split()
        if not any(part in word for value in values.values() for part in value.split())
    ]
    read_before, read_after = ({word.text for word in reading} for reading in (words[0], words[-1]))
    lost = [word for word in kept if word in read_before and word not in read_after and word not in OF_PEOPLE]
    return {
        "readable": {
            kind: bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", left))
            for kind, value in printed.items()
        },
        "left": len(redacted.left),
        "others": len(kept),
        "hidden": len(lost),
    }


# DICOM ------------------------------------------------------------------------------------------------------
def dicom_of(pages: Sequence[Page], form: str) -> tuple[bytes, list[str]]:
    """A file of pages as frames, and all that is planted in its header.

    Args:
        form: "RGB", "MONOCHROME1" or "MONOCHROME2" of 16 bits.
    """
    patient = pages[0].fields.patient
    planted = [
        patient.name.replace(", ", "^"),
        patient.record,
        "Nurse^Nora",
        "Sankt Elsewhere",
        "19310203",
        "ACC77123",
    ]
    new = pydicom.Dataset()
    new.file_meta = pydicom.dataset.FileMetaDataset()
    new.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    new.SOPClassUID = pydicom.uid.MultiFrameTrueColorSecondaryCaptureImageStorage
    new.SOPInstanceUID, new.StudyInstanceUID, new.SeriesInstanceUID = "1.2.3.41", "1.2.3.42", "1.2.3.43"
    for name in ("PatientName", "ReferringPhysicianName"):
        setattr(new, name, planted[0])
    new.OperatorsName = new.PerformingPhysicianName = planted[2]
    new.PatientID = new.StudyID = planted[1]
    new.PatientBirthDate = new.StudyDate = new.SeriesDate = planted[4]
    new.AccessionNumber, new.InstitutionName, new.PatientAge = planted[5], planted[3], "095Y"
    new.StudyDescription = new.ImageComments = f"{planted[2]} at {planted[3]}"
    item = pydicom.Dataset()
    item.PatientID, item.RequestedProcedureDescription = planted[1], planted[0]
    new.OtherPatientIDsSequence, new.RequestAttributesSequence, new.ViewCodeSequence = [item], [item], [item]
    block = new.private_block(0x0011, planted[3], create=True)
    block.add_new(1, "LO", planted[0])
    new.add_new(0x60000022, "LO", planted[0])  # OverlayDescription
    images = [np.asarray(page.image) for page in pages]
    if form != "RGB":
        images = [image[..., 0].astype(np.uint16) * 16 for image in images]
        images = [4080 - image for image in images] if form == "MONOCHROME1" else images
    new.Rows, new.Columns = images[0].shape[:2]
    new.SamplesPerPixel, new.PhotometricInterpretation = 3 if form == "RGB" else 1, form
    if form == "RGB":
        new.PlanarConfiguration = 0
    new.BitsAllocated = new.BitsStored = 8 * images[0].itemsize
    new.HighBit, new.PixelRepresentation, new.NumberOfFrames = new.BitsStored - 1, 0, len(images)
    data = np.stack(images).tobytes()
    new.add_new("PixelData", "OW", data + bytes(len(data) % 2))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new.save_as(file, enforce_file_format=True)
    return file.getvalue(), planted


def redacted_dicom(number: int) -> list[dict[str, Any]]:
    """A line of each frame; every fifth file has two, which are of one page, clean and in its damage."""
    # Drawn from the numbers behind those of the pages. Kinds and damages take turns.
    cfg = PageConfig(seed=SEED)
    page = draw_page(cfg, "test", 1000 + number * 7)
    pages = [page]
    if number % 5 == 0:
        clean = draw_page(cfg, "test", 1000 + number * 7, kind=page.kind, damage="clean")
        pages = [clean, clean]
    words = list[list[Word]]()

    def read(image: Image.Image) -> list[Word]:
        words.append(read_page(image))
        return words[-1]

    content, planted = dicom_of(pages, ("RGB", "MONOCHROME1", "MONOCHROME2")[number % 3])
    written, redacted = redact_dicom(content, read=read)
    header = pydicom.dcmread(io.BytesIO(written))
    del header.PixelData
    text = (str(header) + str(header.file_meta)).casefold()
    in_header = sum(value.casefold() in text for value in [*planted, "1.2.3.4", "095y"])
    lines = []
    last = np.cumsum([frame.readings for frame in redacted]) - 1
    for i, (drawn, frame) in enumerate(zip(pages, redacted, strict=True)):
        image = open_image(written, page=i, full_range=True)
        line = measure(drawn, image, frame, words[last[i]])
        flags = header.PatientIdentityRemoved, header.BurnedInAnnotation
        lines.append(line | {"header": in_header if i == 0 else 0, "flags": flags})
    return lines


def print_rows(name: str, lines: Sequence[dict[str, Any]]) -> None:
    """Left of all by kind, and the damage to other words."""
    for kind in KINDS:
        there = [line for line in lines if kind in line["visible"]]
        visible = sum(line["visible"][kind] for line in there)
        readable = sum(line["readable"][kind] for line in there)
        print(
            f"{name:14} {kind:8} {len(there):4} values, visible {visible}, readable after the last reading {readable}"
        )
    others, hidden, labels = (sum(line[key] for line in lines) for key in ("others", "hidden", "labels"))
    readings = [line["readings"] for line in lines]
    print(
        f"{name:14} other words {others}, blacked out {hidden} ({hidden / max(1, others):.2%}), of them labels {labels}; "
        f"readings {min(readings)} to {max(readings)}; pages that say that something is left "
        f"{sum(line['left'] > 0 for line in lines)} of {len(lines)}"
    )


def kept(folder: Path, name: str, count: int, make: Callable[[int], Any]) -> list[Any]:
    """Results of `count` files, each written to the folder as it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for number in track(range(count), f"redacting {name}"):
        path = folder / f"{name}-{number}.json"
        if not path.exists():
            path.write_text(json.dumps(make(number)))
        results.append(json.loads(path.read_text()))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where results are kept")
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--letters", type=int, default=12)
    parser.add_argument("--dicoms", type=int, default=10)
    args = parser.parse_args()
    pages = kept(args.folder, "page", args.pages, redacted_page)
    for damage in ("clean", "scan", "photo"):
        print_rows(damage, [line for line in pages if line["damage"] == damage] or pages)
    print_rows("all pages", pages)
    for name, is_given in (("letter", False), ("letter-known", True)):
        letters = kept(args.folder, name, args.letters, partial(redacted_letter, is_given=is_given))
        for kind in sorted({kind for line in letters for kind in line["readable"]}):
            there = [line["readable"][kind] for line in letters if kind in line["readable"]]
            print(f"{name:14} {kind:8} {len(there):4} values, readable after the last reading {sum(there)}")
        others, hidden = (sum(line[key] for line in letters) for key in ("others", "hidden"))
        print(f"{name:14} other words {others}, blacked out or misread {hidden}")
    files = kept(args.folder, "dicom", args.dicoms, redacted_dicom)
    frames = [line for lines in files for line in lines]
    print_rows("DICOM frames", frames)
    print(f"DICOM files {len(files)}: planted values in headers {sum(line['header'] for line in frames)}")


if __name__ == "__main__":
    main()
