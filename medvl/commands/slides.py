"""`invoke slides`: patch features audited before training, or packed into one store."""

from collections.abc import Sequence

from medvl.base import files
from medvl.slides import check, pack
from medvl.slides.names import feature_files
from medvl.slides.questions import audit_slide_conversations

_SHOWN = 10  # faulty records that are printed of each file


def check_or_pack(
    action: str, features: str, data: Sequence[str], out: str, dims: int, encoder: str, drop: bool
) -> int:
    """Print what is wrong with features and questions, or pack features into a store; returns the exit
    status, 0 or 3.

    Raises:
        ValueError: an unknown action, or an argument is missing.
    """
    if action == "pack":
        _pack(features, out, dims, encoder, drop)
        return 0
    if action != "check":
        raise ValueError(f"slides: the action must be check or pack, got {action!r}")
    return _check(features, data, dims, encoder)


def _pack(features: str, out: str, dims: int, encoder: str, drop: bool) -> None:
    if not out:
        raise ValueError("slides pack: needs out, the store to make or go on with")
    files.check_writable(out)
    paths = [path for paths_of_slide in feature_files(features).values() for path in paths_of_slide]
    if not paths:
        raise ValueError(f"{features}: holds no patch features (.h5, .pt, .npy or .csv files)")
    packed = pack.pack(paths, out, dims=dims, encoder=encoder, drop=drop, progress=True)
    print(
        f"{out}: {packed.written} slides of {packed.patches:,} patches written, {packed.skipped} were there, "
        f"{packed.empty} are empty, "
        f"{packed.dropped} patches left out"
    )


def _check(features: str, data: Sequence[str], dims: int, encoder: str) -> int:
    record_of_slide: dict[str, str] = {}  # {slide: the record that names it first}
    num_faults = 0
    for file in data:
        try:
            conversations, faults = audit_slide_conversations(file)
        except ValueError as e:
            print(f"cannot be read: {e}")
            num_faults += 1
            continue
        for conversation in conversations:
            for slide in conversation.slides:
                record_of_slide.setdefault(slide, f"{file}, record {conversation.row}")
        num_faults += len(faults)
        print(f"{file}: {len(faults)} faulty records")
        for fault in faults[:_SHOWN]:
            print(f"  {fault.row}: {fault.text}")
    if data and not record_of_slide:
        raise ValueError(
            f"slides check: no record of {', '.join(data)} names a slide; without --data all features are "
            "looked at"
        )
    audit = check.check_slides(features, record_of_slide, dims=dims, encoder=encoder)
    print("\n".join(check.describe(audit)))
    return 0 if audit.ok and num_faults == 0 else 3
