"""How slides are called, which case they belong to, and which files of patch features are theirs."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from medvl.base import files
from medvl.base.files import PathLike
from medvl.slides.formats import SUFFIXES

_TCGA = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])")  # project, tissue source site, patient
_SCANS = (  # suffixes of slides before features were computed from them
    ".svs",
    ".tif",
    ".tiff",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".vms",
    ".vmu",
    ".bif",
    ".svslide",
    ".dcm",
    ".czi",
    ".isyntax",
)


def case_of(name: str) -> str:
    """The case (patient) of a slide: "TCGA-GV-A40G" of "TCGA-GV-A40G-01Z-00-DX1".

    A name that is not of TCGA's form is a case of its own.
    """
    match = _TCGA.match(name)
    if match is None:
        return name
    return match[0]


def is_case(name: str) -> bool:
    """Whether a name is that of a TCGA case and not of a slide."""
    return _TCGA.fullmatch(name) is not None


def slide_name(name: object) -> str:
    """The name of a slide: the last part of a path, without the suffixes of feature files and scans.

    "./BLCA/A-01.csv" and "A-01.svs" are "A-01".
    """
    last = re.split(r"[/\\]", str(name))[-1]  # names in files of questions may be paths of Windows
    # In this order: "A-01.svs.h5" are features of the scan "A-01.svs". At most one suffix of each kind, as
    # what remains may hold dots of its own.
    for suffixes in (SUFFIXES, _SCANS):
        for suffix in suffixes:
            if last.lower().endswith(suffix) and len(last) > len(suffix):
                last = last[: -len(suffix)]
                break
    return last


@frozen(kw_only=True)
class Match:
    """The slides that a name stands for: none, one, all of a case, or several that it does not tell apart."""

    stems: tuple[str, ...] = ()  # names of the slides
    places: tuple[Any, ...] = ()  # their features: files, or names in a store
    clear: bool = True  # False: the name means one of these, and does not say which


def find_slides(
    names: Iterable[object], by_stem: Mapping[str, Sequence[Any]], folder: PathLike = ""
) -> dict[str, Match]:
    """{name: what it stands for}, the names as texts, each once.

    A name is one of:
        - a path of a file of features as it is written, absolute or below `folder`;
        - a slide: the stem that equals it, else the stems that begin with it and a dot ("A-DX1" is
          "A-DX1.UUID" and never "A-DX10");
        - a TCGA case ("TCGA-GV-A40G"), which stands for all its slides.
    Where several files match, the folders that the name is written with decide ("BLCA/X.csv" beside
    "BRCA/X.csv").

    Args:
        names: known suffixes are taken off: `slide_name`.
        by_stem: {stem: its features}, as of `feature_files`.
        folder: where paths begin; "" for a store, whose slides have no paths.
    """
    index = _index_stems(by_stem)
    matches = {}
    for name in map(str, names):
        matches[name] = _match(name, index, by_stem, folder)
    return matches


def _match(
    name: str, index: Mapping[str, Sequence[str]], by_stem: Mapping[str, Sequence[Any]], folder: PathLike
) -> Match:
    # A path that exists is never ambiguous, whatever other files are called.
    if folder:
        file = _file_as_written(name, folder)
        if file is not None:
            return Match(stems=(slide_name(name),), places=(file,))
    stem_of_name = slide_name(name)
    stems = index.get(stem_of_name, [])
    if is_case(stem_of_name):
        return _match_case(name, stems, by_stem)
    candidates: list[Any] = []
    for stem in stems:
        candidates += by_stem[stem]
    places = _narrow(name, candidates)
    # Only the slides of which a file is left: an error lists these.
    matched = [stem for stem in stems if any(place in places for place in by_stem[stem])]
    return Match(stems=tuple(matched), places=tuple(places), clear=len(places) < 2)


def _match_case(name: str, stems: Sequence[str], by_stem: Mapping[str, Sequence[Any]]) -> Match:
    """All slides of a case; clear if each of them has one file."""
    places: list[Any] = []
    clear = True
    for stem in stems:
        # Slide by slide: several slides are what a case is, several files of one slide are a question.
        slide_places = _narrow(name, by_stem[stem])
        clear = clear and len(slide_places) == 1
        places += slide_places
    return Match(stems=tuple(stems), places=tuple(places), clear=clear)


def _file_as_written(name: str, folder: PathLike) -> Path | None:
    """The file of features whose path the name is."""
    path = Path(folder, name)  # an absolute name stays as it is
    if path.suffix.lower() not in SUFFIXES:
        return None
    try:
        is_file = path.is_file()
    except OSError:  # the name is longer than a path may be
        return None
    return path if is_file else None


def _narrow(name: str, places: Sequence[Any]) -> list[Any]:
    """The one file of several whose path ends as the name is written; all of them where that does not decide.

    The path must end in the name's folders and file name, or at least in its folders.
    """
    if len(places) < 2:
        return list(places)
    # "./" and "../" are relative to a folder of whoever wrote the name, not to ours.
    steps = [step for step in re.split(r"[/\\]", name) if step not in ("", ".", "..")]
    paths = [place for place in places if isinstance(place, Path)]  # names in a store have no folders
    same_file = [path for path in paths if _ends_in(path, steps)]
    if len(same_file) == 1:
        return same_file
    # The name may be a scan's, "BLCA/X.svs": then no file of features ends so, but its folder may decide.
    same_folder = [path for path in paths if _ends_in(path.parent, steps[:-1])]
    if len(same_folder) == 1:
        return same_folder
    return list(places)


def _ends_in(path: Path, steps: Sequence[str]) -> bool:
    if not steps:  # path.parts[-0:] would be the complete path
        return False
    return list(path.parts[-len(steps) :]) == list(steps)


def _index_stems(stems: Iterable[str]) -> dict[str, list[str]]:
    """{name to ask for slides by: their stems}: a stem, what stands before each of its dots, and its case.

    A name that is itself a stem stands for nothing else: where there are "S1" and "S1.1", "S1" is the first.
    """
    stems = sorted(set(stems))
    index: dict[str, list[str]] = {}
    for stem in stems:
        # Only at dots: "A-DX1" must find "A-DX1.8288CA92" and never "A-DX10".
        names = {stem[: dot.start()] for dot in re.finditer(r"\.", stem)}
        names.add(case_of(stem))
        for name in sorted(names):
            index.setdefault(name, []).append(stem)
    for stem in stems:
        index[stem] = [stem]
    return index


def feature_files(folder: PathLike) -> dict[str, list[Path]]:
    """{stem: files of patch features of that name} of a folder and all below it, sorted; no hidden files.

    Raises:
        ValueError: no such folder, or one below that cannot be read (`files.files_below`).
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    by_stem: dict[str, list[Path]] = {}
    for path in files.files_below(folder):
        # Hidden files are for example what macOS leaves beside copies ("._A.h5").
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith("."):
            by_stem.setdefault(slide_name(path.name), []).append(path)
    return {stem: sorted(paths) for stem, paths in sorted(by_stem.items())}


def near_names(name: str, stems: Iterable[str]) -> str:
    """What an error says of a slide that is missing: " (near: A, B)", or that none of so many is near."""
    stems = list(stems)
    # Upper and lower case are a near miss here; they are no match in `find_slides`.
    by_folded_name = {}
    for candidate, candidate_stems in _index_stems(stems).items():
        by_folded_name[candidate.casefold()] = candidate_stems
    nearest: list[str] = []
    for close_name in difflib.get_close_matches(slide_name(name).casefold(), by_folded_name, 3):
        for stem in by_folded_name[close_name]:
            if stem not in nearest:  # a slide is in the index by several names
                nearest.append(stem)
    if not nearest:
        return f" (none of {len(stems)} is near)"
    return f" (near: {', '.join(nearest[:3])})"
