"""Systems that are no language model behind the service: each has a process with its run, which is loaded once.

Files that are sent stay in memory: they are opened by a name that the system gives to memory.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medvl.base import files
from medvl.serve.interface import Refused
from medvl.serve.worker import Calls

Emit = Callable[[str, Any], None]
_SLICES = 12  # of a scan that are shown


@contextmanager
def file_in_memory(content: bytes) -> Iterator[Path]:
    """A path whose file is in memory and goes with this context (Linux)."""
    handle = os.memfd_create("upload")
    try:
        with open(handle, "wb", closefd=False) as f:
            f.write(content)
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def open_ct(post: Callable[[Any], None], emit: Emit, folder: str) -> Calls:
    """Findings of chest CTs, by a run of ct_clip."""
    from medvl.systems.ct_clip import look, run

    with files.file_lock(folder, shared=True):
        opened = run.load(Path(folder))

    def classify(
        content: bytes, findings: Sequence[str], settings: Sequence[str], with_slices: bool
    ) -> dict[str, Any]:
        """Raises:
        Refused: a scan that cannot be read or placed; its header is not repeated.
        """
        try:
            with file_in_memory(content) as path:
                found = look.look_at_scan(
                    Path(folder), path, findings, settings=settings, opened=opened, slices=False
                )
        except ValueError as e:
            raise Refused(400, f"the scan cannot be read: {_without_path(e)}") from None
        volume = found["volume"]
        slices = _pictures(volume.voxels[slice(*volume.occupied)]) if with_slices else []
        thresholds = found["calibrated_threshold"]
        return {"probability": found["calibrated"], "threshold": thresholds, "slices": slices}

    return Calls(emit, {"classify": classify}, {"run": Path(folder).name})


def _pictures(voxels: np.ndarray) -> list[bytes]:
    """PNGs of some slices of a volume [s, y, x], from bottom to top, the whole range of greys."""
    chosen = np.linspace(0, len(voxels) - 1, min(_SLICES, len(voxels))).round().astype(int)
    low, high = float(voxels.min()), float(voxels.max())
    shown = (voxels[chosen].astype(np.float32) - low) / max(1.0, high - low) * 255
    return [_png(Image.fromarray(picture.round().astype(np.uint8))) for picture in shown]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def open_slides(post: Callable[[Any], None], emit: Emit, folder: str) -> Calls:
    """Answers about slides, by a run of slide_vqa."""
    from medvl.slides.maps import draw_map
    from medvl.slides.relevance import top_patches
    from medvl.systems.slide_vqa import look, run
    from medvl.systems.slide_vqa.record import data_path

    with files.file_lock(folder, shared=True):
        opened = run.load(Path(folder))

    def ask(question: str, content: bytes, slide: str, max_tokens: int) -> dict[str, Any]:
        """Args:
            content: a file of patch features; b"" = a slide of the run by its name.
        Raises:
            Refused: features that cannot be read, no slide of the name.
        """
        if not content:
            return told(look_at_name(slide, question, max_tokens))
        # In memory, and gone with the answer: HDF5 opens files by their real names only, and tokens of a slide are
        # kept by its content.
        with tempfile.TemporaryDirectory(prefix="medvl-slide-", dir="/dev/shm") as place:
            path, tokens = Path(place) / "slide", Path(place) / "tokens"
            path.write_bytes(content)
            try:
                return told(
                    look.look_at_slide(folder, path, question, "", max_tokens, opened=opened, cache=tokens)
                )
            except ValueError as e:
                raise Refused(400, f"the slide cannot be read: {_without_path(e)}") from None

    def look_at_name(slide: str, question: str, max_tokens: int) -> dict[str, Any]:
        # With its store, as a name alone could be that of any file of this machine.
        features = data_path(opened[0].cfg, "features")
        try:
            if "/" in slide or "::" in slide:
                raise ValueError
            return look.look_at_slide(folder, f"{features}::{slide}", question, "", max_tokens, opened=opened)
        except ValueError:  # its message tells names of other slides
            raise Refused(400, "there is no slide of that name in the run, or it cannot be read") from None

    def told(answer: dict[str, Any]) -> dict[str, Any]:
        patches = top_patches(answer["relevance"], answer["coords"], 5)
        picture = draw_map(answer["relevance"], answer["coords"], answer["patch_size"])
        return {"text": answer["answer"].strip(), "patches": patches, "map": _png(picture)}

    return Calls(emit, {"ask": ask}, {"run": Path(folder).name})


def open_unified(post: Callable[[Any], None], emit: Emit, folder: str) -> Calls:
    """Answers about images and pictures from texts, by a run of unified."""
    from medvl.systems.unified import ask as answers
    from medvl.systems.unified import draw, run

    with files.file_lock(folder, shared=True):
        model, params = run.load(Path(folder))

    def ask(question: str, image: Any, max_tokens: int) -> str:
        return _plain_errors(lambda: answers.ask_image(model, params, image, question, max_tokens=max_tokens))

    def draw_picture(text: str, image: Any, temperature: float, seed: int) -> bytes:
        picture = _plain_errors(
            lambda: draw.draw_image(model, params, image, text, temperature=temperature, seed=seed)
        )
        return _png(picture)

    return Calls(emit, {"ask": ask, "draw": draw_picture}, {"run": Path(folder).name})


def _plain_errors(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except ValueError as e:
        raise Refused(400, _without_path(e)) from None


def _without_path(error: ValueError) -> str:
    """The message of an error about a file, without names of files."""
    return " ".join(word for word in str(error).split() if "/" not in word)[:300]
