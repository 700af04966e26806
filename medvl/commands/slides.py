"""`invoke slides`: patch features audited before training, or packed into one store."""

from collections.abc import Sequence
from pathlib import Path

from medvl.base import files
from medvl.slides import check, pack
from medvl.slides.names import feature_files
from medvl.slides.questions import audit_slide_conversations

_SHOWN = 10  # faulty records that are printed of each file; the count says how many there are


def check_or_pack(
    action: str, features: str, data: Sequence[str], store_path: str, dims: int, encoder: str, drop: bool
) -> int:
    """Print what is wrong with features and questions, or pack features into a store; returns the exit
    status, 0 or 3.

    Raises:
        ValueError: an unknown action, or an argument is missing.
    """
    if action == "pack":
        _pack(features, store_path, dims, encoder, drop)
        return 0
    if action != "check":
        raise ValueError(f"slides: the action must be check or pack, got {action!r}")
    return _check(features, data, dims, encoder)


def _pack(features: str, store_path: str, dims: int, encoder: str, drop: bool) -> None:
    if not store_path:
        raise ValueError("slides pack: needs out, the store to make or go on with")
    files.check_writable(store_path)
    paths: list[Path] = []
    # Several files of one slide are passed on together: `pack` refuses them, and names both.
    for paths_of_slide in feature_files(features).values():
        paths += paths_of_slide
    if not paths:
        raise ValueError(f"{features}: holds no patch features (.h5, .pt, .npy or .csv files)")
    packed = pack.pack(paths, store_path, dims=dims, encoder=encoder, drop=drop, progress=True)
    print(
        f"{store_path}: {packed.written} slides of {packed.patches:,} patches written, {packed.skipped} were "
        f"there, {packed.empty} are empty, {packed.dropped} patches left out"
    )


def _check(features: str, data: Sequence[str], dims: int, encoder: str) -> int:
    record_of_slide: dict[str, str] = {}  # {slide: the record that names it first}
    num_faults = 0
    for file in data:
        # A file that cannot be read at all is one fault: the others are still looked at.
        try:
            conversations, faults = audit_slide_conversations(file)
        except ValueError as e:
            print(f"cannot be read: {e}")
            num_faults += 1
            continue
        for conversation in conversations:
            for slide in conversation.slides:
                # The first record is named in messages about a slide without features.
                record_of_slide.setdefault(slide, f"{file}, record {conversation.row}")
        num_faults += len(faults)
        print(f"{file}: {len(faults)} faulty records")
        for fault in faults[:_SHOWN]:
            print(f"  {fault.row}: {fault.text}")
    # An empty set of slides would mean all features, which is another question than the one that was put.
    if data and not record_of_slide:
        raise ValueError(
            f"slides check: no record of {', '.join(data)} names a slide; without --data all features are "
            "looked at"
        )
    audit = check.check_slides(features, record_of_slide, dims=dims, encoder=encoder)
    print("\n".join(check.describe(audit)))
    return 0 if audit.ok and num_faults == 0 else 3
