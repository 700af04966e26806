"""What is computed about pages outside of the model: opened, read (OCR), and compared with an answer.

Each function runs in a process of its own, since decoders of pictures may crash and reading takes seconds.
"""

import io
import signal
from collections.abc import Callable, Sequence
from typing import Any

from attrs import evolve, frozen
from PIL import Image

from medvl.documents.evidence import Evidence, check_fields, drop_unverified
from medvl.documents.fields import Fields, json_leaves, read_answer
from medvl.documents.words import Word
from medvl.serve import uploads
from medvl.serve.uploads import Limits
from medvl.serve.worker import Calls

_OPEN_S = 30  # seconds in which the files of a request must be open
_PICTURE_PIXELS = 1600  # on the longer side of the picture of a page
_LISTS = ("diagnoses", "medications", "labs", "vitals", "procedures")


@frozen(kw_only=True)
class Checked:
    """The fields of an answer with what its pages show of them."""

    fields: Fields
    evidence: Evidence | None  # None where the pages were not read


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
        # A decoder that hangs in C sees no Python exception: the signal, which nobody handles, ends the process.
        signal.alarm(_OPEN_S)
        try:
            return uploads.open_uploads(contents, limits, chosen, window=window)
        finally:
            signal.alarm(0)

    # Where no readers run, answers become fields here.
    checks: dict[str, Callable[..., Any]] = {"check": check_answers, "check_json": check_json}
    return Calls(emit, {"open": open_files, "picture": page_picture, **checks}, {})


def page_picture(image: Image.Image) -> bytes:
    """The PNG of a page for the eye: at most 1,600 pixels on its longer side."""
    small = image.copy()
    small.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    file = io.BytesIO()
    small.save(file, "PNG")
    return file.getvalue()


def open_reader(post: Callable[[Any], None], emit: Callable[[str, Any], None]) -> Calls:
    """A service that reads the words of pages, and compares answers with them.

    Raises:
        ValueError: no reader is installed.
    """
    from medvl.documents.read_page import check_reader, read_page

    check_reader()
    return Calls(emit, {"read": read_page, "check": check_answers, "check_json": check_json}, {})


def check_answers(answers: Sequence[str], pages: Sequence[Sequence[Word]] | None, strict: bool) -> Checked:
    """The fields that a model states of the pages of one document, and what they show of them.

    Args:
        answers: of each page.
        pages: the words of each page; None = they are not compared.
        strict: what no page shows is left out.
    """
    fields = merge_fields([read_answer(answer) for answer in answers])
    if pages is None:
        return Checked(fields=fields, evidence=None)
    evidence = check_fields(fields, pages)
    if strict:
        fields, evidence = drop_unverified(fields, evidence)
    return Checked(fields=fields, evidence=evidence)


def merge_fields(pages: Sequence[Fields]) -> Fields:
    """The fields of the pages of one document: lists one behind the other, the patient as first stated."""
    first = pages[0]
    patient = first.patient
    for page in pages[1:]:
        missing = {
            name: getattr(page.patient, name)
            for name in ("name", "sex", "age", "record", "date")
            if not getattr(patient, name)
        }
        patient = evolve(patient, **missing)
    lists = {name: tuple(entry for page in pages for entry in getattr(page, name)) for name in _LISTS}
    kind = next((page.kind for page in pages if page.kind), "")
    text = "\n".join(page.text for page in pages if page.text)
    # As the worst of them was read: "empty" or "prose" is what somebody must know of.
    read_as = "prose" if any(page.read_as == "prose" for page in pages) else first.read_as
    return evolve(first, kind=kind, patient=patient, text=text, read_as=read_as, **lists)


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
