"""Check the patch features that a training needs, and list all faults at once."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from medvl.base.display import track
from medvl.base.files import PathLike
from medvl.base.text import few
from medvl.slides import features, names
from medvl.slides.features import About
from medvl.slides.formats import SUFFIXES
from medvl.slides.names import Match
from medvl.slides.store import Slides, content_digest, open_slides

_MAX_SUGGESTIONS = 20  # missing slides for which near names are searched; the search compares with every file


@frozen(kw_only=True)
class SlideCheck:
    """Result of `check_slides`. Slides have the names under which they were requested."""

    requested: int  # how many slides
    usable: int = 0  # of these, with exactly one set of features that can be read
    patches: int = 0
    dims: int = 0  # as required, or of most slides
    encoder: str = ""  # likewise; "" where no file names one
    missing: Mapping[str, str] = field(factory=dict)  # -> where the slide is requested
    near: Mapping[str, str] = field(factory=dict)  # of the first missing ones -> similar names, in words
    duplicates: Mapping[str, Sequence[str]] = field(factory=dict)  # -> the slides or files it could be
    unreadable: Mapping[str, str] = field(factory=dict)  # -> the reason
    wrong_dims: Mapping[str, int] = field(factory=dict)
    wrong_encoder: Mapping[str, str] = field(factory=dict)
    bad_patches: Mapping[str, tuple[int, int]] = field(factory=dict)  # -> (how many not finite, first from 0)
    empty: Sequence[str] = ()  # slides without a patch; not a fault by itself
    cases: Sequence[str] = ()  # cases of several slides, read as one bag of patches; not a fault
    unknown: int = 0  # files or slides that were not requested

    @property
    def ok(self) -> bool:
        return not (
            self.missing
            or self.duplicates
            or self.unreadable
            or self.wrong_dims
            or self.wrong_encoder
            or self.bad_patches
        )


def check_slides(
    source: PathLike, requested: Mapping[str, str], *, dims: int = 0, encoder: str = "", values: bool = True
) -> SlideCheck:
    """Check the requested slides in a folder of patch features or a store of slides.

    Args:
        source: a folder, searched with all its subfolders, or a file that `pack.pack` wrote.
        requested: {name of a slide, as `names.find_slides` takes it: where it is requested, such as
            "train.json, line 3"}. Empty: all slides are checked.
        dims, encoder: required of all slides; 0 and "": those of most slides. Files that name no encoder
            pass.
        values: read all patches. In a folder this finds NaN and infinity, in a store it finds slides that
            changed since they were packed. False reads shapes and attributes only.
    Returns:
        all faults; `describe` prints them.
    Raises:
        ValueError: `source` is neither a folder nor a store, or nothing is requested and the folder is empty.
            Faults of the data never raise.
    """
    source_is_folder = Path(source).is_dir()
    store = None if source_is_folder else open_slides(source)
    locations = _locations(source, store)
    all_locations = {*_flat(locations.values())}
    if not requested:
        requested = {str(location): "all are looked at" for location in _flat(locations.values())}
        if not requested:
            raise ValueError(f"{source}: holds no patch features ({', '.join(SUFFIXES)})")
    matches = names.find_slides(requested, locations, source if source_is_folder else "")
    selected = _select(matches)
    headers, unreadable, bad_patches = _inspect_all(selected, store, dims, values)
    by_match = _match_faults(matches, requested, locations)
    by_header = _header_faults(headers, dims, encoder)
    readable = {selected[name] for name in headers}
    used = {*_flat(match.places for match in matches.values())}
    return SlideCheck(
        requested=len(requested),
        usable=sum(_is_usable(match, readable) for match in matches.values()),
        patches=sum(header.rows for header in headers.values()),
        unreadable=unreadable,
        bad_patches=bad_patches,
        unknown=len(all_locations - used),
        **by_match,
        **by_header,
    )


def describe(check: SlideCheck, most: int = 5) -> list[str]:
    """Lines to print: a summary, then each kind of fault with its first `most` slides."""
    kind = f"{check.dims} features each"
    if check.encoder:
        kind += f" of {check.encoder}"
    summary = (
        f"{check.usable} of {check.requested} slides found, {check.patches} patches, {kind}; "
        f"{check.unknown} files are not asked for"
    )
    missing, duplicates, bad_patches = list[str](), list[str](), list[str]()
    for name, origin in check.missing.items():
        missing.append(f"{name} ({origin}){check.near.get(name, '')}")
    for name, locations in check.duplicates.items():
        duplicates.append(f"{name} ({few(list(locations), 3)})")
    for name, (count, first) in check.bad_patches.items():
        bad_patches.append(f"{name} ({count} patches, first {first})")
    faults: list[tuple[str, Sequence[str]]] = [
        ("missing", missing),
        ("found more than once", duplicates),
        ("unreadable", list(check.unreadable.values())),  # the reasons name the files
        ("with another number of features", _with_values(check.wrong_dims)),
        ("of another encoder", _with_values(check.wrong_encoder)),
        ("with NaN or infinity", bad_patches),
        ("without a patch", list(check.empty)),
        ("cases of several slides, each taken as one bag", list(check.cases)),
    ]
    lines = [summary]
    for fault, slides in faults:
        if slides:
            lines.append(f"{len(slides)} {fault}: {few(slides, most)}")
    return lines


def _with_values(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} ({value})" for name, value in values.items()]


def _locations(source: PathLike, store: Slides | None) -> Mapping[str, Sequence[Any]]:
    """{slide: its files}, or in a store {slide: its name}."""
    if store is None:
        return names.feature_files(source)
    return {name: [name] for name in store.names}


def _flat(groups: Iterable[Sequence[Any]]) -> list[Any]:
    return [item for group in groups for item in group]


def _select(matches: Mapping[str, Match]) -> dict[str, Any]:
    """{name: its file or its name in the store}. A case of several slides is checked slide by slide."""
    selected = dict[str, Any]()
    for name, match in matches.items():
        if not match.clear:  # it is reported as a duplicate; which of its files is meant is not known
            continue
        if len(match.places) == 1:
            selected[name] = match.places[0]
            continue
        for location in match.places:
            selected[f"{name} ({location})"] = location
    return selected


def _match_faults(
    matches: Mapping[str, Match], requested: Mapping[str, str], locations: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """The fields of a SlideCheck that names alone decide."""
    missing, duplicates, cases = dict[str, str](), dict[str, list[str]](), list[str]()
    for name, match in matches.items():
        if not match.places:
            missing[name] = requested[name]
        elif not match.clear:
            duplicates[name] = [str(location) for location in match.places]
        elif len(match.places) > 1:
            cases.append(name)
    near = {}
    for name in list(missing)[:_MAX_SUGGESTIONS]:
        near[name] = names.near_names(name, locations)
    return {"missing": missing, "near": near, "duplicates": duplicates, "cases": tuple(cases)}


def _header_faults(headers: Mapping[str, About], dims: int, encoder: str) -> dict[str, Any]:
    """The fields of a SlideCheck that shapes and attributes decide."""
    # Where nothing is required, the majority is right: the report then names the few files that differ.
    dims = dims or _most_common(header.dims for header in headers.values()) or 0
    encoder = encoder or _most_common(header.encoder for header in headers.values()) or ""
    wrong_dims, wrong_encoder, empty = dict[str, int](), dict[str, str](), list[str]()
    for name, header in headers.items():
        if header.dims not in (0, dims):
            wrong_dims[name] = header.dims
        if header.encoder not in ("", encoder):
            wrong_encoder[name] = header.encoder
        if not header.rows:
            empty.append(name)
    return {
        "dims": dims,
        "encoder": encoder,
        "wrong_dims": wrong_dims,
        "wrong_encoder": wrong_encoder,
        "empty": tuple(empty),
    }


def _inspect_all(
    selected: Mapping[str, Any], store: Slides | None, dims: int, values: bool
) -> tuple[dict[str, About], dict[str, str], dict[str, tuple[int, int]]]:
    """({slide: what it holds}, {unreadable slide: reason}, {slide: (patches not finite, the first)})."""
    headers, unreadable = dict[str, About](), dict[str, str]()
    bad_patches = dict[str, tuple[int, int]]()
    for name, location in track(selected.items(), "checking slides"):
        count, first = 0, -1
        try:
            if store is None:
                header = features.about_slide(location, dims=dims)
                if values:
                    count, first = features.count_bad(location, dims=dims)
            else:
                # No patch of a store is NaN or infinite: `pack` refuses them. It can only have changed since.
                header = store.about(location)
                if values:
                    _check_digest(store, location)
        except ValueError as error:  # all faults are listed: one bad file does not end the check
            unreadable[name] = str(error)
            continue
        headers[name] = header
        if count:
            bad_patches[name] = count, first
    return headers, unreadable, bad_patches


def _check_digest(store: Slides, name: str) -> None:
    if content_digest(store.chunks(name)) != store.source(name)[1]:
        raise ValueError(
            f"{store.path}: {name!r} is not as it was written, its digest differs; "
            "pack it again into a new store"
        )


def _is_usable(match: Match, readable: set[Any]) -> bool:
    # Of a case every slide must be readable: it is used as one bag of all their patches.
    return bool(match.places) and match.clear and {*match.places} <= readable


def _most_common(values: Iterable[Any]) -> Any:
    """The most frequent value that is not empty, the first of equals; None where all are empty."""
    counts = Counter(value for value in values if value)
    if not counts:
        return None
    value, _ = counts.most_common(1)[0]
    return value
