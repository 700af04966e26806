"""Are the patch features that a training asks for all there, of one kind and whole? Everything that is wrong, at once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from medvl.base.display import track
from medvl.base.files import PathLike
from medvl.hub.checkpoints import few
from medvl.slides import features, names
from medvl.slides.features import About
from medvl.slides.formats import SUFFIXES
from medvl.slides.pack import Slides, content_digest, open_slides


@frozen(kw_only=True)
class SlideCheck:
    """What `check_slides` found; slides are called as they were asked for."""

    wanted: int
    found: int = 0  # of these, with exactly one file that can be read
    patches: int = 0
    dims: int = 0  # what was wanted, or what most have
    encoder: str = ""  # likewise; "" where no file says it
    missing: Mapping[str, str] = field(factory=dict)  # -> where it is asked for
    near: Mapping[str, str] = field(factory=dict)  # of the first missing ones: names that are near, in words
    duplicates: Mapping[str, Sequence[str]] = field(factory=dict)  # -> the slides or files it could be
    unreadable: Mapping[str, str] = field(factory=dict)  # -> the reason
    wrong_dims: Mapping[str, int] = field(factory=dict)
    wrong_encoder: Mapping[str, str] = field(factory=dict)
    bad_patches: Mapping[str, tuple[int, int]] = field(
        factory=dict
    )  # NaN or infinity -> (how many patches, the first from 0)
    empty: Sequence[str] = ()  # slides without a patch; no fault by itself
    cases: Sequence[str] = ()  # names of cases with several slides, which are one bag of patches; no fault
    unknown: int = 0  # files or slides that nothing asks for

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
    where: PathLike, wanted: Mapping[str, str], *, dims: int = 0, encoder: str = "", values: bool = True
) -> SlideCheck:
    """Look at everything that `wanted` asks for in a folder of patch features or a store of slides; at all of it if that is empty.

    Args:
        where: a folder, searched with all its subfolders, or a file that `slide_store.pack` wrote.
        wanted: {name of a slide, as `names.find_slides` takes it: where it is asked for ("train.json, line 3")}.
        dims, encoder: what all must have; 0 and "": what most have. Files that do not say their encoder pass.
        values: read all patches, to find NaN and infinity, or in a store what is no longer as it was written; False looks at shapes.
    Returns:
        all that is wrong; `describe` says it in words.
    Raises:
        ValueError: `where` is neither a folder nor a store, or nothing is asked for and nothing is there. Nothing else: faults of the data
            are listed.
    """
    store = None if Path(where).is_dir() else open_slides(where)
    files: Mapping[str, Sequence[Any]] = (
        names.feature_files(where) if store is None else {n: [n] for n in store.names}
    )
    if not wanted:
        wanted = {str(place): "all are looked at" for found in files.values() for place in found}
        if not wanted:
            raise ValueError(f"{where}: holds no patch features ({', '.join(SUFFIXES)})")
    matches = names.find_slides(wanted, files, where if store is None else "")
    # A case of several slides is looked at slide by slide.
    places = dict[str, Any]()
    for name, match in matches.items():
        if match.clear:
            places |= {
                name if len(match.places) == 1 else f"{name} ({place})": place for place in match.places
            }
    known, unreadable = dict[str, About](), dict[str, str]()
    bad = dict[str, tuple[int, int]]()
    for name, place in track(places.items(), "checking slides"):
        try:
            about = features.about_slide(place, dims=dims) if store is None else store.about(place)
            if values and store is None and (worst := features.count_bad(place, dims=dims))[0]:
                bad[name] = worst
            elif values and store is not None:
                _check_digest(store, place)
            known[name] = about
        except ValueError as e:
            unreadable[name] = str(e)
    dims = dims or _most(a.dims for a in known.values())
    encoder = encoder or _most(a.encoder for a in known.values()) or ""
    asked = {place for match in matches.values() for place in match.places}
    return SlideCheck(
        wanted=len(wanted),
        found=sum(
            bool(m.places) and m.clear and {*m.places} <= {places[n] for n in known} for m in matches.values()
        ),
        patches=sum(a.rows for a in known.values()),
        dims=dims or 0,
        encoder=encoder,
        missing={n: wanted[n] for n, match in matches.items() if not match.places},
        near={
            n: names.near_names(n, files)
            for n in [n for n, match in matches.items() if not match.places][:20]
        },
        duplicates={n: [str(p) for p in match.places] for n, match in matches.items() if not match.clear},
        unreadable=unreadable,
        wrong_dims={n: a.dims for n, a in known.items() if a.dims not in (0, dims)},
        wrong_encoder={n: a.encoder for n, a in known.items() if a.encoder not in ("", encoder)},
        bad_patches=bad,
        empty=tuple(n for n, a in known.items() if not a.rows),
        cases=tuple(n for n, match in matches.items() if match.clear and len(match.places) > 1),
        unknown=len({p for found in files.values() for p in found} - asked),
    )


def describe(check: SlideCheck, most: int = 5) -> list[str]:
    """The lines to print: what was found, then every kind of fault with its first `most` slides."""
    kind = f"{check.dims} features each" + (f" of {check.encoder}" if check.encoder else "")
    lines = [
        f"{check.found} of {check.wanted} slides found, {check.patches} patches, {kind}; {check.unknown} files are not asked for"
    ]
    faults: list[tuple[str, Sequence[str]]] = [
        ("missing", [f"{n} ({asked}){check.near.get(n, '')}" for n, asked in check.missing.items()]),
        ("found more than once", [f"{n} ({few(list(found), 3)})" for n, found in check.duplicates.items()]),
        ("unreadable", list(check.unreadable.values())),
        ("with another number of features", [f"{n} ({d})" for n, d in check.wrong_dims.items()]),
        ("of another encoder", [f"{n} ({e})" for n, e in check.wrong_encoder.items()]),
        (
            "with NaN or infinity",
            [f"{n} ({k} patches, first {first})" for n, (k, first) in check.bad_patches.items()],
        ),
        ("without a patch", list(check.empty)),
        ("cases of several slides, each taken as one bag", list(check.cases)),
    ]
    return lines + [f"{len(found)} {what}: {few(found, most)}" for what, found in faults if found]


def _most(values: Any) -> Any:
    """The commonest that is not empty; the first of equally common ones."""
    return next((v for v, _ in Counter(v for v in values if v).most_common(1)), None)


def _check_digest(store: Slides, name: str) -> None:
    if content_digest(store.chunks(name)) != store.source(name)[1]:
        raise ValueError(
            f"{store.path}: {name!r} is not as it was written, its digest differs; pack it again into a new store"
        )
