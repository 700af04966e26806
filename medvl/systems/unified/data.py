"""The data of unified: heads are drawn, files are checked and read, the codes of targets are computed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from medvl.evaluation.pictures import check_sides
from medvl.hub.vqgan_files import read_vq_config
from medvl.language.conversations import Conversation, check_gold, read_conversations
from medvl.language.drawings import Drawing, read_drawings
from medvl.language.vision import open_item
from medvl.phantoms import anatomy
from medvl.systems.unified.codes import target_codes
from medvl.systems.unified.model import Vq, picture_shape
from medvl.systems.unified.record import Config, Source, Split, data_folder, source_path


def prepare(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: heads are drawn, files must be there.

    Raises:
        ValueError: lists those that are missing.
    """
    if cfg.data.source == "phantoms":
        counts = anatomy.draw_anatomy(cfg.data.phantoms, data_folder(cfg))
        log(f"drawn in {data_folder(cfg)}: " + ", ".join(f"{n} heads {split}" for split, n in counts.items()))
    paths = [source_path(cfg, source, split) for source in cfg.data.sources for split in source.splits]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing: {', '.join(missing)}; data.sources says where they are"
        )


def find_sources(cfg: Config, task: str, split: Split, stage: str = "") -> list[Source]:
    """The sources of a task that have a split and that a stage sees; of "" all."""
    found = []
    for source in cfg.data.sources:
        seen = not stage or not source.stages or stage in source.stages
        if source.task == task and split in source.splits and seen:
            found.append(source)
    return found


def read_questions(cfg: Config, source: Source, split: Split) -> list[Conversation]:
    """The conversations of a split; those of the test split have a last answer that can be compared with."""
    path, root = source_path(cfg, source, split), source.root or None
    conversations = read_conversations(path, root=root, max_images=cfg.chat.max_images)
    if split == "test":
        check_gold(conversations)
    return conversations


def read_targets(cfg: Config, source: Source, split: Split) -> list[Drawing]:
    """The drawings of a split, whose codes are those of the VQ model."""
    if cfg.vq and not cfg.vq.start:
        model = cfg.vq.model
    else:
        model = read_vq_config(cfg.vq.start if cfg.vq else cfg.codes)
    if split == "test":
        check_sides(
            (model.resolution, model.resolution), f"data source {source.name}, test (the VQ model's size)"
        )
    rows, columns = picture_shape(model)
    path, root = source_path(cfg, source, split), source.root or None
    return read_drawings(path, number=rows * columns, codebook=model.codes, root=root)


def read_all_targets(cfg: Config, split: Split) -> list[Drawing]:
    """The drawings of a split of all sources."""
    drawings = list[Drawing]()
    for source in find_sources(cfg, "draw", split):
        drawings += read_targets(cfg, source, split)
    return drawings


def target_places(drawings: Sequence[Drawing]) -> dict[Path, str]:
    """{picture that is drawn: the line that names it first}, sorted."""
    # Reversed, so that the first line stays.
    places = {drawing.target: drawing.question.place for drawing in reversed(drawings) if drawing.target}
    return dict(sorted(places.items()))


def picture_opener(cfg: Config, places: Mapping[Path, str] | None = None) -> Callable[[Any], Image.Image]:
    """How files of pictures are opened: by the window of the record; errors name their place."""

    def open_picture(path: Any) -> Image.Image:
        try:
            return open_item(path, window=cfg.chat.window)
        except ValueError as e:
            place = (places or {}).get(Path(path))
            raise ValueError(f"{place}: {e}" if place else str(e)) from e

    return open_picture


def codes_of(cfg: Config, model: Vq, drawings: Sequence[Drawing], folder: Path) -> list[list[int]]:
    """The codes of the targets, row by row; those of files are computed once, in `folder`, by all processes."""
    places = target_places(drawings)
    sizes, weights = model
    computed = target_codes(
        sizes,
        weights,
        [*places],
        folder / "targets",
        open_picture=picture_opener(cfg, places),
        opened=str(cfg.chat.window),
        together=True,
    )
    rows = []
    for drawing in drawings:
        rows.append(computed[str(drawing.target)].flatten().tolist() if drawing.target else [*drawing.codes])
    return rows
