"""How images, slides and other visual items enter a language model: one record for each kind of vision."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen
from PIL import Image
from torch import Tensor

from medvl.base.tree import Tree
from medvl.components.project import ProjectConfig, project
from medvl.hub.checkpoints import find_file, read_json
from medvl.hub.skeletons import Skeleton
from medvl.language import images, intern_vl, qwen_vl
from medvl.language.clip_vision import ClipImageConfig, clip_pixels, dump_clip_config, level_params, square
from medvl.language.templates import INTERN_VL, QWEN_VL, Placeholder
from medvl.weights import shards

QWEN_VL_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
Batch = Mapping[str, Tensor]


@frozen(kw_only=True, eq=False)
class Vision:
    """How the items of conversations become visual tokens. An item is what a record names: an image, a slide.

    A batch of b conversations holds "images" [b], the number of items of each, and the tensors that
    `load_items` makes.
    """

    placeholder: Placeholder  # the token that stands in the text once for every visual token
    count_tokens: Callable[[Any], int]  # item -> number of its visual tokens
    load_items: Callable[[Sequence[Any]], dict[str, Tensor]]  # all items of a batch, in order -> its tensors
    select_rows: Callable[
        [Batch, slice], dict[str, Tensor]
    ]  # (batch, rows of a micro-batch) -> their tensors
    # (parameters of the system, batch on the device) -> visual tokens [n, d] that replace the placeholders in
    # the embedded text; None: the model itself has a vision encoder and takes the tensors by name.
    embed: Callable[[Tree, Batch], Tensor] | None = None
    example: Any = None  # a small item that a model built from scratch is tried with
    preprocessor: dict[str, Any] = field(factory=dict)  # saved as preprocessor_config.json


def item_range(batch: Batch, rows: slice) -> tuple[int, int]:
    """The first item of these rows of a batch, and the one behind the last: for `Vision.select_rows`."""
    # Items lie one behind the other over all rows, without an axis of rows, so that counts are summed up.
    return int(batch["images"][: rows.start].sum()), int(batch["images"][: rows.stop].sum())


# Vision encoders of Hugging Face architectures --------------------------------------------------------------
def vision_of(
    config: Mapping[str, Any],
    name: str,
    *,
    max_pixels: int = 0,
    min_pixels: int = 0,
    window: tuple[float, ...] = (),
) -> Vision | None:
    """The vision of a Hugging Face architecture; None where it has none that we know.

    Args:
        config: its config.json.
        name: folder or hub name whose preprocessor_config.json is read; "" takes the architecture's defaults.
        max_pixels, min_pixels: of an image, 0 = as the preprocessor says.
        window: (black, white) of 16-bit and DICOM images, as `ChatConfig.window`.
    """
    kind = config["model_type"]
    if kind not in (*QWEN_VL_MODELS, "internvl"):
        return None
    encoder = config["vision_config"]
    raw = None
    if name:
        # Newer versions of transformers write the image settings into processor_config.json, under
        # "image_processor".
        raw = read_json(find_file(name, ("preprocessor_config.json", "processor_config.json")))
    if kind == "internvl":
        side = encoder["image_size"]
        # transformers writes [height, width]; tiles are square.
        side = side[0] if isinstance(side, list) else side
        tile_config = intern_vl.parse_tile_config(raw) if raw else intern_vl.TileConfig(size=side)
        # What a tile becomes is decided by the model, whatever the file says.
        tile_config = evolve(tile_config, tokens=config["image_seq_length"])
        return intern_tiles(tile_config, max_pixels=max_pixels, window=window)
    if raw:
        image_config = qwen_vl.parse_image_config(raw)
    else:
        image_config = qwen_vl.ImageConfig(
            patch=encoder["patch_size"],
            merge=encoder["spatial_merge_size"],
            temporal=encoder["temporal_patch_size"],
        )
    if max_pixels:
        image_config = evolve(image_config, max_pixels=max_pixels)
    if min_pixels:
        image_config = evolve(image_config, min_pixels=min_pixels)
    return qwen_patches(image_config, window=window)


def placeholder_ids(model_type: str, tok: Any) -> dict[str, int]:
    """What the config of a vision-language model from scratch says of the tokenizer's image tokens."""
    token_id = tok.convert_tokens_to_ids
    if model_type == "internvl":
        return {"image_token_id": token_id(INTERN_VL.token)}
    return {
        "image_token_id": token_id(QWEN_VL.token),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id(QWEN_VL.before),
        "vision_end_token_id": token_id(QWEN_VL.after),
    }


def qwen_patches(cfg: qwen_vl.ImageConfig, *, window: tuple[float, ...] = ()) -> Vision:
    """Images of Qwen-VL, each of its own number of patches; items are paths, or images that are open."""

    def count_tokens(item: Path | Image.Image) -> int:
        width, height = open_item(item, window=window).size
        try:
            h, w = qwen_vl.smart_resize(cfg, height, width)
        except ValueError as e:
            raise ValueError(f"{item}: {e}") from e
        return qwen_vl.count_image_tokens(cfg, (1, h // cfg.patch, w // cfg.patch))

    def load_items(items: Sequence[Path | Image.Image]) -> dict[str, Tensor]:
        if not items:
            return {}
        opened = [open_item(item, window=window) for item in items]
        patches, grid = qwen_vl.patchify_images(cfg, opened)
        return {"pixel_values": patches, "image_grid_thw": grid}

    def select_rows(batch: Batch, rows: slice) -> dict[str, Tensor]:
        first, stop = item_range(batch, rows)
        # A micro-batch of texts alone: the model refuses pixel_values without placeholders, empty ones too.
        if stop == first:
            return {}
        grid = batch["image_grid_thw"]
        # Patches of every image [n]: pixel_values is [all patches, features], and where an image begins in it
        # only the grids say.
        patches = grid.prod(1)
        start, end = int(patches[:first].sum()), int(patches[:stop].sum())
        return {"image_grid_thw": grid[first:stop], "pixel_values": batch["pixel_values"][start:end]}

    # 2 x 2 visual tokens; for Qwen2-VL 56 pixels a side, just its min_pixels.
    side = 2 * cfg.patch * cfg.merge
    return Vision(
        placeholder=QWEN_VL,
        count_tokens=count_tokens,
        load_items=load_items,
        select_rows=select_rows,
        example=Image.new("RGB", (side, side)),
        preprocessor=qwen_vl.dump_image_config(cfg),
    )


def intern_tiles(cfg: intern_vl.TileConfig, *, max_pixels: int = 0, window: tuple[float, ...] = ()) -> Vision:
    """Images of InternVL, as square tiles; items are paths, or images that are open.

    Args:
        max_pixels: larger images are made smaller before they are cut (a tile count has no bound in
            pixels); 0 = no bound.
    """

    def count_tokens(item: Path | Image.Image) -> int:
        width, height = open_item(item, window=window, max_pixels=max_pixels).size
        columns, rows = intern_vl.tile_grid(cfg, height, width)
        # A single tile is the whole image already.
        thumbnail = cfg.thumbnail and columns * rows > 1
        return intern_vl.count_tile_tokens(cfg, columns * rows + thumbnail)

    def load_items(items: Sequence[Path | Image.Image]) -> dict[str, Tensor]:
        if not items:
            return {}
        opened = [open_item(item, window=window, max_pixels=max_pixels) for item in items]
        return {"pixel_values": intern_vl.tile_images(cfg, opened)[0]}

    def select_rows(batch: Batch, rows: slice) -> dict[str, Tensor]:
        # How many tiles a row has is told by its visual tokens: an image may have any number of tiles.
        visual = batch["visual"].sum(1)
        first = int(visual[: rows.start].sum()) // cfg.tokens
        stop = int(visual[: rows.stop].sum()) // cfg.tokens
        return {"pixel_values": batch["pixel_values"][first:stop]} if stop > first else {}

    return Vision(
        placeholder=INTERN_VL,
        count_tokens=count_tokens,
        load_items=load_items,
        select_rows=select_rows,
        example=Image.new("RGB", (cfg.size, cfg.size)),
        preprocessor=intern_vl.dump_tile_config(cfg),
    )


def clip_vision(
    cfg: ClipImageConfig,
    skeleton: Skeleton,
    sizes: ProjectConfig,
    projector: str,
    placeholder: Placeholder,
    *,
    window: tuple[float, ...] = (),
) -> Vision:
    """Images through a frozen tower of CLIP and a projector; items are paths, or images that are open.

    Visual tokens are those of the patches, without the class token. The weights of the tower are
    params["tower"], which may have more layers than the skeleton; where they are not trained, nothing is kept of
    them for a backward pass.

    Args:
        skeleton: of the level, from `clip_vision.tower_skeleton`.
        sizes: of the projector.
        projector: where its weights are in params: "understand/projector".
        placeholder: a token of the language model's, such as `templates.PLACEHOLDERS["phi3"]`.
    Raises:
        ValueError: sizes of tower, pixels and projector do not fit each other.
    """
    tower = skeleton.config
    if (tower["image_size"], tower["hidden_size"]) != (cfg.size, sizes.inputs):
        raise ValueError(
            f"clip_vision: the tower takes {tower['image_size']} px and makes {tower['hidden_size']} features, "
            f"got images of {cfg.size} px and a projector of {sizes.inputs}"
        )
    tokens = (cfg.size // tower["patch_size"]) ** 2

    def count_tokens(item: Path | Image.Image) -> int:
        # All images have the same number; what cannot be shown is refused here, before anything is trained.
        image = open_item(item, window=window)
        try:
            square(cfg, image)
        except ValueError as e:
            raise ValueError(f"{item}: {e}") from e
        return tokens

    def load_items(items: Sequence[Path | Image.Image]) -> dict[str, Tensor]:
        return {"pixel_values": clip_pixels(cfg, [open_item(item, window=window) for item in items])}

    def select_rows(batch: Batch, rows: slice) -> dict[str, Tensor]:
        first, stop = item_range(batch, rows)
        return {"pixel_values": batch["pixel_values"][first:stop]}

    def embed(params: Tree, batch: Batch) -> Tensor:
        weights = level_params(shards.lazy_shards(params["tower"]), skeleton)
        pixels = batch["pixel_values"].to(next(iter(weights.values())).dtype)
        number = len(pixels)
        features = pixels.new_zeros(0, tokens, sizes.inputs)
        # A batch of texts alone has no images, and the tower is not for none. But where processes gather weights from
        # each other, all must run it: others may have images.
        if not number and shards.any_sharded(params["tower"]):
            pixels = pixels.new_zeros(1, *pixels.shape[1:])
        if len(pixels):
            features = skeleton(weights, pixel_values=pixels).last_hidden_state[:number, 1:]
        node = params
        for key in projector.split("/"):
            node = node[key]
        return project(sizes, shards.lazy_shards(node), features).flatten(0, 1)

    return Vision(
        placeholder=placeholder,
        count_tokens=count_tokens,
        load_items=load_items,
        select_rows=select_rows,
        embed=embed,
        example=Image.new("RGB", (cfg.size, cfg.size)),
        preprocessor=dump_clip_config(cfg),
    )


def open_item(
    item: Path | Image.Image, *, window: tuple[float, ...] = (), max_pixels: int = 0
) -> Image.Image:
    """An image of at most `max_pixels` pixels (0 = no limit); one that is open is taken as it is."""
    if isinstance(item, Image.Image):
        return item
    # only_deep: a folder may mix PNGs of 8 bits, which need no window, with 16-bit and DICOM files.
    levels = images.check_window(window, "chat.window")
    image = images.open_image(item, window=levels, only_deep=True)
    return images.cap_pixels(image, max_pixels)
