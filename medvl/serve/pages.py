"""What is computed about pages outside of the model: opened, read (OCR), and compared with an answer.

Each function runs in a process of its own, since decoders of pictures may crash and reading takes seconds.
"""

import io
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from attrs import evolve, fields_dict, frozen
from PIL import Image

from medvl.documents.evidence import Contradiction, Evidence, check_fields, drop_unverified
from medvl.documents.fields import Fields, Patient, json_leaves, leaves, read_answer
from medvl.documents.words import Word
from medvl.serve import uploads
from medvl.serve.uploads import Limits
from medvl.serve.worker import Calls

T = TypeVar("T")
_CHECK_S = 20  # seconds in which the answers of a request must be compared with its pages
_OPEN_S = 30  # seconds in which the files of a request must be open
_PICTURE_PIXELS = 1600  # on the longer side of the picture of a page
_FEW_WORDS = 5  # a page with fewer may well state nothing
_LISTS = ("diagnoses", "medications", "labs", "vitals", "procedures")


@frozen(kw_only=True)
class Checked:
    """The fields of an answer with what its pages show of them."""

    fields: Fields
    evidence: Evidence | None  # None where the pages were not read
    warnings: tuple[Contradiction, ...] = ()  # about whole pages


def open_opener(
    post: Callable[[Any], None], emit: Callable[[str, Any], None], limits: Limits, mib: int
) -> Calls:
    """A service that opens pages: the one that meets files of strangers, and so has little memory.

    Args:
        mib: of memory that it may take; 0 = any.
    """
    if mib:
        uploads.limit_memory(mib)

    def open_files(
        contents: Sequence[bytes], chosen: Sequence[int] = (), window: tuple[float, float] | None = None
    ) -> list[list[Image.Image]]:
        return _in_time(_OPEN_S, lambda: uploads.open_uploads(contents, limits, chosen, window=window))

    return Calls(emit, {"open": open_files, "picture": page_picture}, {})


def open_checker(post: Callable[[Any], None], emit: Callable[[str, Any], None]) -> Calls:
    """A service that compares answers with pages. What a model may write, and a page show, takes any time to compare."""

    def check(**arguments: Any) -> Checked:
        return _in_time(_CHECK_S, lambda: check_answers(**arguments))

    def check_trees(**arguments: Any) -> list[Evidence]:
        return _in_time(_CHECK_S, lambda: check_json(**arguments))

    return Calls(emit, {"check": check, "check_json": check_trees}, {})


def _in_time(seconds: int, work: Callable[[], T]) -> T:
    """The result of work, at whose time limit the process ends: a decoder that hangs in C sees no Python exception, but
    the signal, which nobody handles, ends it."""
    signal.alarm(seconds)
    try:
        return work()
    finally:
        signal.alarm(0)


def page_picture(image: Image.Image) -> bytes:
    """The PNG of a page for the eye: at most 1,600 pixels on its longer side."""
    small = image.copy()
    small.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    file = io.BytesIO()
    small.save(file, "PNG")
    return file.getvalue()


def open_reader(post: Callable[[Any], None], emit: Callable[[str, Any], None]) -> Calls:
    """A service that reads the words of pages.

    Raises:
        ValueError: no reader is installed.
    """
    from medvl.documents.read_page import check_reader, read_page

    check_reader()
    return Calls(emit, {"read": read_page}, {})


def check_answers(answers: Sequence[str], pages: Sequence[Sequence[Word]] | None, strict: bool) -> Checked:
    """The fields that a model states of the pages of one document, and what they show of them.

    Args:
        answers: of each page.
        pages: the words of each page; None = they are not compared.
        strict: what no page shows is left out.
    """
    stated = [read_answer(answer) for answer in answers]
    fields = merge_fields(stated)
    warnings = (*_other_patients(stated), *_empty_answers(stated, pages))
    if pages is None:
        return Checked(fields=fields, evidence=None, warnings=warnings)
    evidence = check_fields(fields, pages)
    if strict:
        fields, evidence = drop_unverified(fields, evidence)
    return Checked(fields=fields, evidence=evidence, warnings=warnings)


def merge_fields(pages: Sequence[Fields]) -> Fields:
    """The fields of the pages of one document: lists one behind the other, the patient as first stated.

    A page adds to the patient only what the pages before leave open, and nothing where it names another one.
    """
    patient = pages[0].patient
    for page in pages[1:]:
        if not _contradicts(patient, page.patient):
            open_parts = [name for name in fields_dict(Patient) if not getattr(patient, name)]
            patient = evolve(patient, **{name: getattr(page.patient, name) for name in open_parts})
    lists = {name: tuple(entry for page in pages for entry in getattr(page, name)) for name in _LISTS}
    kind = next((page.kind for page in pages if page.kind), "")
    text = "\n".join(page.text for page in pages if page.text)
    # As the worst of them was read: "empty" or "prose" is what somebody must know of.
    read_as = "prose" if any(page.read_as == "prose" for page in pages) else pages[0].read_as
    return evolve(pages[0], kind=kind, patient=patient, text=text, read_as=read_as, **lists)


def _contradicts(one: Patient, other: Patient) -> bool:
    """Whether two pages cannot be about one patient: another name (whatever the order of its parts) or record."""
    names = [{*re.findall(r"\w+", patient.name.casefold())} for patient in (one, other)]
    records = ["".join(re.findall(r"\w+", patient.record.casefold())) for patient in (one, other)]
    return (all(names) and names[0] != names[1]) or (all(records) and records[0] != records[1])


def _other_patients(pages: Sequence[Fields]) -> Iterator[Contradiction]:
    patients = [page.patient for page in pages]
    for number, patient in enumerate(patients):
        if any(_contradicts(before, patient) for before in patients[:number]):
            message = f"page {number} of the document names another patient: send each document by itself"
            yield Contradiction(path="patient/name", kind="patient", message=message)


def _empty_answers(
    pages: Sequence[Fields], words: Sequence[Sequence[Word]] | None
) -> Iterator[Contradiction]:
    for number, page in enumerate(pages):
        count = None if words is None else len(words[number])
        if not leaves(page) and (count is None or count >= _FEW_WORDS):
            seen = "" if count is None else f", which shows {count} words"
            yield Contradiction(
                path="", kind="empty", message=f"the answer states nothing of page {number}{seen}"
            )


def check_json(trees: Sequence[Any], pages: Sequence[Sequence[Word]]) -> list[Evidence]:
    """What each page shows of the texts and numbers of a JSON value of its own schema, by their paths in it."""
    checked = []
    for tree, words in zip(trees, pages, strict=True):
        values = json_leaves(tree)
        # As procedures, of which each is a text of its own.
        found = check_fields(Fields(procedures=tuple(values.values())), [words])
        paths = {f"procedures/{i}": path for i, path in enumerate(values)}
        renamed = [evolve(value, path=paths[value.path]) for value in found.values]
        checked.append(Evidence(values=tuple(renamed)))
    return checked
