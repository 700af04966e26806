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

_TCGA = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])")
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
    return match[0] if match else name


def is_case(name: str) -> bool:
    """Whether a name is that of a TCGA case and not of a slide."""
    return _TCGA.fullmatch(name) is not None


def slide_name(name: object) -> str:
    """The name of a slide: the last part of a path, without the suffixes of feature files and scans.

    "./BLCA/A-01.csv" and "A-01.svs" are "A-01".
    """
    last = re.split(r"[/\\]", str(name))[-1]
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
    names: Iterable[object], known: Mapping[str, Sequence[Any]], folder: PathLike = ""
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
        known: {stem: its features}, as of `feature_files`.
        folder: where paths begin; "" for a store, whose slides have no paths.
    """
    index = _index_stems(known)
    return {name: _match(name, index, known, folder) for name in map(str, names)}


def _match(
    name: str, index: Mapping[str, Sequence[str]], known: Mapping[str, Sequence[Any]], folder: PathLike
) -> Match:
    file = _file_as_written(name, folder) if folder else None
    if file is not None:
        return Match(stems=(slide_name(name),), places=(file,))
    stems = index.get(slide_name(name), [])
    if is_case(slide_name(name)):
        return _match_case(name, stems, known)
    candidates = [place for stem in stems for place in known[stem]]
    places = _narrow(name, candidates)
    matched = [stem for stem in stems if any(place in places for place in known[stem])]
    return Match(stems=tuple(matched), places=tuple(places), clear=len(places) < 2)


def _match_case(name: str, stems: Sequence[str], known: Mapping[str, Sequence[Any]]) -> Match:
    """All slides of a case; clear if each of them has one file."""
    places: list[Any] = []
    clear = True
    for stem in stems:
        of_slide = _narrow(name, known[stem])
        clear = clear and len(of_slide) == 1
        places += of_slide
    return Match(stems=tuple(stems), places=tuple(places), clear=clear)


def _file_as_written(name: str, folder: PathLike) -> Path | None:
    """The file of features whose path the name is."""
    path = Path(folder, name)  # an absolute name stays as it is
    try:
        return path if path.suffix.lower() in SUFFIXES and path.is_file() else None
    except OSError:  # the name is longer than a path may be
        return None


def _narrow(name: str, places: Sequence[Any]) -> list[Any]:
    """The one file of several whose path ends as the name is written; all of them where that does not decide.

    The path must end in the name's folders and file name, or at least in its folders.
    """
    if len(places) < 2:
        return list(places)
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    paths = [place for place in places if isinstance(place, Path)]
    same_file = [path for path in paths if _ends_in(path, parts)]
    if len(same_file) == 1:
        return same_file
    same_folder = [path for path in paths if _ends_in(path.parent, parts[:-1])]
    if len(same_folder) == 1:
        return same_folder
    return list(places)


def _ends_in(path: Path, parts: Sequence[str]) -> bool:
    return bool(parts) and list(path.parts[-len(parts) :]) == list(parts)


def _index_stems(stems: Iterable[str]) -> dict[str, list[str]]:
    """{name to ask for slides by: their stems}: a stem, what stands before each of its dots, and its case.

    A name that is itself a stem stands for nothing else: where there are "S1" and "S1.1", "S1" is the first.
    """
    stems = sorted(set(stems))
    index: dict[str, list[str]] = {}
    for stem in stems:
        names = {stem[: dot.start()] for dot in re.finditer(r"\.", stem)}
        names.add(case_of(stem))
        for name in sorted(names):
            index.setdefault(name, []).append(stem)
    return index | {stem: [stem] for stem in stems}


def feature_files(folder: PathLike) -> dict[str, list[Path]]:
    """{stem: files of patch features of that name} of a folder and all below it, sorted; no hidden files.

    Raises:
        ValueError: no such folder, or one below that cannot be read (`files.files_below`).
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    by_stem: dict[str, list[Path]] = {}
    for path in files.files_below(folder):
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith("."):
            by_stem.setdefault(slide_name(path.name), []).append(path)
    return {stem: sorted(paths) for stem, paths in sorted(by_stem.items())}


def near_names(name: str, stems: Iterable[str]) -> str:
    """What an error says of a slide that is missing: " (near: A, B)", or that none of so many is near."""
    stems = list(stems)
    # Upper and lower case are a near miss here; they are no match in `find_slides`.
    folded = {asked.casefold(): hits for asked, hits in _index_stems(stems).items()}
    close = difflib.get_close_matches(slide_name(name).casefold(), folded, 3)
    nearest = dict.fromkeys(stem for key in close for stem in folded[key])
    if not nearest:
        return f" (none of {len(stems)} is near)"
    return f" (near: {', '.join([*nearest][:3])})"
