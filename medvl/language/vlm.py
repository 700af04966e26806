"""Vision-language models: visual tokens in place of placeholders, inputs of the model, hidden states, answer
loss.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl.base.text import few
from medvl.base.transfer import index_device, to_device
from medvl.components import losses
from medvl.hub import kv_cache, vision_attention
from medvl.hub.skeletons import Skeleton
from medvl.language import qwen_vl
from medvl.weights import lazy

_MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # families whose three-axis positions `qwen_vl.mrope` makes
# What architectures do to logits behind the head, by the names of their configs; these values mean that they
# do nothing.
_LOGIT_SETTINGS = {
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "output_multiplier_scale",
}
_NO_EFFECT = (None, 1, 1.0)
# Inputs that may hold images, so that positions on one axis would be wrong.
_VISUAL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "inputs_embeds",
)
_NOT_PASSED_ON = ("ids", "mask", "labels", "visual", "images", "position_ids", "segments")  # of a batch
# What of a batch is looked at before the model is called. As long as it lies on the CPU, nothing waits.
INDICES = ("ids", "mask", "labels", "segments", "position_ids", "mm_token_type_ids", "image_grid_thw")


def splice(
    ids: Tensor, visual: Tensor, embedding: Tensor, token: int, *, counts: Sequence[int] | None = None
) -> Tensor:
    """Embed a text whose placeholders are replaced by visual tokens, row by row and in each from left to
    right.

    Args:
        ids: [b, t] with `token` once for every visual token; any number of images, anywhere, in any of the
            rows. They may stay on the CPU, where they are counted without waiting for the device.
        visual: [n, d], the visual tokens of all rows one after the other.
        embedding: weight of the token table [v, d], any kind of weight.
        token: id of the placeholder; it need not be in the table.
        counts: how many visual tokens each row should have; with it, errors of two rows cannot make up for
            each other.
    Returns:
        [b, t, d] of the table's dtype; gradients reach `visual` and the table.
    Raises:
        ValueError: placeholders and visual tokens differ in number (says in which rows), other shapes or
            dtypes.
    """
    _check_ids("splice", ids)
    if visual.dim() != 2 or not visual.is_floating_point() or visual.shape[1] != embedding.shape[1]:
        raise ValueError(
            f"splice: visual must be floats [n, {embedding.shape[1]}], got {_describe(visual)}; project to "
            "the table's width"
        )
    is_visual = ids == token
    per_row = is_visual.sum(1).tolist()
    if counts is not None:
        _check_counts(per_row, counts, token)
    if sum(per_row) != len(visual):
        rows = few([f"row {i} has {n}" for i, n in enumerate(per_row)])
        raise ValueError(
            f"splice: {sum(per_row)} placeholders (id {token}) meet {len(visual)} visual tokens: {rows}"
        )
    # An estimate, whose weights are on "meta", embeds ids of the CPU.
    ids = to_device(ids, index_device(embedding.device))
    is_visual = ids == token
    # The placeholder need not be in the table, so that id 0 is looked up in its place.
    text = F.embedding(ids.masked_fill(is_visual, 0), embedding)
    # It fills from left to right and row by row, just the order of `visual`.
    return text.masked_scatter(is_visual[..., None], visual.to(text.dtype))


def _check_counts(per_row: Sequence[int], counts: Sequence[int], token: int) -> None:
    if len(counts) != len(per_row):
        raise ValueError(
            f"splice: counts must be one number per row, got {len(counts)} for {len(per_row)} rows"
        )
    wrong = list[str]()
    for row, (n, count) in enumerate(zip(per_row, counts, strict=True)):
        if n != count:
            wrong.append(f"row {row} has {n} for {count}")
    if wrong:
        raise ValueError(
            f"splice: every row must hold one placeholder (id {token}) per visual token; {few(wrong)}"
        )


def visual_rows(ids: Tensor, token: int) -> Tensor:
    """Which sample each visual token belongs to, int64 [n]: what `weights.low_rank(rows=...)` needs in a
    vision tower.

    Args:
        ids: [b, t] with the placeholder `token` once for every visual token.
    Raises:
        ValueError: ids are not whole numbers [b, t].
    """
    _check_ids("visual_rows", ids)
    return torch.arange(len(ids), device=ids.device).repeat_interleave((ids == token).sum(1))


def language_head_names(skeleton: Skeleton) -> tuple[str, str | None]:
    """The names in params of the language head's weight and bias (None without one).

    A tied head has the name of the token table.

    Raises:
        ValueError: there is no head (load with head="language"), or the logits are more than hidden states
            times head.
    """
    module: Any = skeleton.module
    kind = skeleton.config.get("model_type")
    settings = sorted(_effective_settings(skeleton.config, _LOGIT_SETTINGS))
    if settings:
        raise ValueError(
            f"language_head_names: logits of {kind} are more than hidden states times head "
            f"({', '.join(settings)}); it cannot be split off"
        )
    if kind == "chameleon":
        raise ValueError(
            "language_head_names: chameleon masks logits behind its head; it cannot be split off"
        )
    head = None
    if hasattr(module, "get_output_embeddings"):
        head = module.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError(
            f"language_head_names: {skeleton.name} ({kind}) has no language head; load it with "
            "head='language'"
        )
    # By identity: a tied head is found under the name that its weight has first.
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    bias = getattr(head, "bias", None)
    if bias is None:
        return names[id(head.weight)], None
    return names[id(head.weight)], names[id(bias)]


def model_inputs(
    skeleton: Skeleton, batch: Mapping[str, Any], device: torch.device | None = None
) -> dict[str, Any]:
    """The keyword arguments of the skeleton's call for a batch with medvl's names; positions are always
    explicit.

    Ids, masks and grids are checked on the CPU and moved then, so that the host waits for the device only
    where they lie there already.

    Positions count the tokens that exist, so padding may be on either side. Those of Qwen-VL have three axes:
    they are taken from "position_ids", or made from "image_grid_thw" and the placeholders; what transformers
    stores of an earlier call is never read.

    A row may hold several conversations ("segments"): positions start at 0 in each, and attention never leaves
    one. transformers tells them apart by their positions, where it gets no mask and keeps no cache.

    Args:
        batch: "ids" [b, t] or "inputs_embeds" [b, t, d] (from `splice`; then "ids" are optional); "mask" [b,
            t], 1 where a token exists (all do if left out); "position_ids" [b, t] or [3, b, t];
            "segments" [b, t], the number of each token's conversation in its row from 1 on, 0 at padding, which
            is on the right; "mm_token_type_ids" [b, t]; "pixel_values", "image_grid_thw" and whatever else the architecture
            takes. "labels", "visual" and "images" are left out.
        device: of the weights; where the batch lies if left out. The grids of images stay on the CPU.
    Raises:
        ValueError: a row without tokens, ids outside the table, images without placeholders or the other way
            round, another number of placeholders than the images need, positions that cannot be determined,
            unknown names.
    """
    if device is None:
        device = _device_of(batch)
    batch = {name: t.cpu() if name in INDICES and t is not None else t for name, t in batch.items()}
    ids = batch.get("ids")
    embeds = batch.get("inputs_embeds")
    mask = _checked_mask(batch)
    _check_rows(skeleton, ids if embeds is None else None, mask)
    _check_images(skeleton, batch, ids)

    # Loss and bookkeeping are the caller's: with labels the model would compute all logits for a loss of its
    # own.
    inputs = {k: v for k, v in batch.items() if k not in _NOT_PASSED_ON and v is not None}
    takes = inspect.signature(skeleton.module.forward).parameters
    unknown = sorted(inputs.keys() - takes.keys() - {"mm_token_type_ids"})
    if unknown:
        known = sorted(takes.keys() - {"kwargs"})
        raise ValueError(f"vlm: {skeleton.name} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    if batch.get("segments") is None:
        positions = _positions(skeleton, batch, ids, mask)
        inputs["attention_mask"] = mask
    else:
        positions = _packed_positions(skeleton, batch, ids, mask)
        # Padding is a segment of its own, which no token before it sees.
        inputs["attention_mask"] = None
    if embeds is None:
        inputs["input_ids"] = ids
    # With explicit positions on three axes the types of tokens have no effect.
    if "mm_token_type_ids" not in takes or _has_mrope(skeleton):
        inputs.pop("mm_token_type_ids", None)
    if "position_ids" in takes:
        inputs["position_ids"] = positions
    stay = set[str]()
    if "image_grid_thw" in inputs and _has_mrope(skeleton):
        from_grid = vision_attention.grid_inputs(skeleton.module, inputs["image_grid_thw"])
        if from_grid:
            stay = {"image_grid_thw", *(name for name in from_grid if name.endswith("seqlens"))}
        inputs |= from_grid
    for name, tensor in inputs.items():
        if name not in stay and tensor is not None:
            target = device if tensor.is_floating_point() else index_device(device)
            inputs[name] = to_device(tensor, target)
    return inputs


def _device_of(batch: Mapping[str, Any]) -> torch.device:
    for name in ("inputs_embeds", "pixel_values", "ids"):
        if batch.get(name) is not None:
            return batch[name].device
    return torch.device("cpu")


def _checked_mask(batch: Mapping[str, Any]) -> Tensor:
    """The mask of a batch as int64 [b, t], after a check of the shapes of ids and embeddings."""
    ids = batch.get("ids")
    embeds = batch.get("inputs_embeds")
    if ids is None and embeds is None:
        names = ", ".join(sorted(batch)) or "nothing"
        raise ValueError(f"vlm: a batch needs ids [b, t] or inputs_embeds [b, t, d], got only {names}")
    if embeds is None:
        tokens: Tensor = ids  # type: ignore[assignment]
    else:
        is_float = embeds.dim() == 3 and embeds.is_floating_point()
        if not is_float or (ids is not None and ids.shape != embeds.shape[:2]):
            raise ValueError(
                "vlm: inputs_embeds must be floats [b, t, d], with [b, t] as of ids if there are any, "
                f"got {_describe(embeds)}"
            )
        # Only its shape [b, t] is used.
        tokens = embeds[..., 0]
    mask = batch.get("mask")
    if mask is None:
        mask = torch.ones(tokens.shape, dtype=torch.int64)
    if mask.shape != tokens.shape or mask.is_floating_point():
        raise ValueError(
            f"vlm: mask must be bool or whole numbers {list(tokens.shape)}, 1 where a token exists, got "
            f"{_describe(mask)}"
        )
    return mask.long()


def hidden_states(skeleton: Skeleton, params: Mapping[str, Tensor], **batch: Any) -> Tensor:
    """The last hidden states [b, t, d], those that the language head would get.

    Args:
        batch: as of `model_inputs`.
    Raises:
        ValueError: as `model_inputs` and `language_head_names`.
    """
    name, _ = language_head_names(skeleton)
    # A head whose weight passes hidden states on: the "logits" are then the hidden states.
    without_head = {**params, name: lazy.passed(params[name])}
    batch = {name: t.cpu() if name in INDICES and t is not None else t for name, t in batch.items()}
    inputs = model_inputs(skeleton, batch, params[name].device)
    if _takes_masks(skeleton):
        mask = _attention_mask(batch, index_device(params[name].device))
        inputs["attention_mask"] = {"full_attention": mask}
    return skeleton(without_head, **inputs, use_cache=False).logits


def _takes_masks(skeleton: Skeleton) -> bool:
    """Whether the decoder takes the masks of its kinds of layers, of which it has one.

    transformers makes masks from "attention_mask" [b, t] or from positions, and waits for the device to see
    whether anything is padded or packed. Masks that are ready it leaves alone, where the code of its decoder
    says so.
    """
    module: Any = skeleton.module
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module
    cfg: Any = getattr(decoder, "config", None)
    if {*(getattr(cfg, "layer_types", None) or ())} != {
        "full_attention"
    } or cfg._attn_implementation != "sdpa":
        return False
    code = inspect.unwrap(type(decoder).forward).__code__
    return "causal_mask_mapping" in code.co_varnames and {"isinstance", "dict"} <= {*code.co_names}


def _attention_mask(batch: Mapping[str, Any], device: torch.device) -> Tensor | None:
    """Which tokens see which, bool [b, 1, t, t]; None where each sees all before it, which is faster.

    Args:
        batch: "segments" or "mask" on the CPU, if there are any.
    """
    segments, mask = batch.get("segments"), batch.get("mask")
    if segments is not None:
        if bool((segments == segments[:, :1]).all()):
            return None
        segments = to_device(segments, device)
        # [b, query, key]
        sees = segments[:, :, None] == segments[:, None, :]
    else:
        if mask is None or bool(mask.all()):
            return None
        sees = to_device(mask, device).bool()[:, None, :]
    causal = torch.ones(sees.shape[2], sees.shape[2], dtype=torch.bool, device=device).tril()
    return (causal & sees)[:, None]


def answer_loss(
    skeleton: Skeleton, params: Mapping[str, Tensor], batch: Mapping[str, Any], *, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the tokens that are trained, summed, and their number; logits of at most `chunk`
    tokens exist at a time.

    Args:
        batch: as of `model_inputs`, and "labels" int64 [b, t], not shifted: -100 where a token is not
            trained, else its id.
    Returns:
        sum in float32 and count. Divide by the count of the whole batch.
    Raises:
        ValueError: as `model_inputs`, `language_head_names` and `losses.token_cross_entropy`; no labels.
    """
    name, bias = language_head_names(skeleton)
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"answer_loss: the batch must have labels [b, t], got only {', '.join(sorted(batch))}"
        )
    hidden = hidden_states(skeleton, params, **batch)
    head = lazy.gathered(params[name])  # once: processes have different numbers of chunks
    head_bias = None
    if bias is not None:
        head_bias = params[bias]
    return losses.token_cross_entropy(hidden, head, labels, bias=head_bias, chunk=chunk)


# Positions and checks ---------------------------------------------------------------------------------------
def _positions(skeleton: Skeleton, batch: Mapping[str, Any], ids: Tensor | None, mask: Tensor) -> Tensor:
    """Positions int64 [b, t], or [3, b, t] of an architecture with three axes."""
    positions = batch.get("position_ids")
    three_axes = _has_three_axes(skeleton)
    if positions is not None:
        _check_positions(positions, mask, three_axes)
        return positions
    # Left padding counts to -1, which no table of positions has; what stands there is masked anyway.
    one_axis = (mask.cumsum(1) - 1).clamp(min=0)
    visual_inputs = [name for name in _VISUAL_INPUTS if batch.get(name) is not None]
    if not three_axes:
        return one_axis
    # Text has the same position on all three axes.
    if not visual_inputs and ids is not None:
        return one_axis.expand(3, -1, -1)

    types = batch.get("mm_token_type_ids")
    grid = batch.get("image_grid_thw")
    if types is None and ids is not None and _has_mrope(skeleton):
        image_token = skeleton.config["image_token_id"]
        types = qwen_vl.token_types(ids, image_token, skeleton.config["video_token_id"])
    has_video = any("video" in name for name in visual_inputs)
    if not _has_mrope(skeleton) or grid is None or types is None or has_video:
        raise ValueError(
            f"vlm: {skeleton.name} has positions on three axes; with {', '.join(visual_inputs)} it needs "
            "position_ids [3, b, t] (qwen_vl.mrope), or image_grid_thw and ids (or mm_token_type_ids): "
            "without them transformers would count on one axis"
        )
    merge = skeleton.config["vision_config"]["spatial_merge_size"]
    # The types take the place of ids: 1 at images, 2 at videos.
    return qwen_vl.mrope(types, mask.bool(), grid, image_token=1, video_token=2, merge=merge)[0]


def _packed_positions(
    skeleton: Skeleton, batch: Mapping[str, Any], ids: Tensor | None, mask: Tensor
) -> Tensor:
    """Positions that start at 0 in every conversation of a row: int64 [b, t], or [4, b, t] of an architecture with
    three axes, the first being those on one axis, by which transformers tells conversations apart."""
    segments = batch["segments"]
    if segments.shape != mask.shape or segments.is_floating_point() or batch.get("position_ids") is not None:
        raise ValueError(
            f"vlm: segments must be whole numbers {list(mask.shape)} without position_ids beside them, got "
            f"{_describe(segments)}"
        )
    columns = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    starts = torch.where(is_first, columns, 0).cummax(1).values
    one_axis = columns - starts
    if not _has_three_axes(skeleton):
        return one_axis
    # Each conversation in a row of its own, where positions are made as they always are; on the CPU, as that
    # looks at single values.
    place, exists = one_axis.cpu(), segments.cpu() > 0
    number = (is_first | (columns == 0)).cpu() & exists
    number = number.flatten().cumsum(0).view_as(place) - 1
    row, column = number[exists], place[exists]
    shape = (int(row[-1]) + 1, int(column.max()) + 1)

    def unpack(packed: Tensor) -> Tensor:
        rows = torch.zeros(shape, dtype=packed.dtype)
        rows[row, column] = packed.cpu()[exists]
        return rows

    alone = {name: t for name, t in batch.items() if name != "mm_token_type_ids"}
    if batch.get("mm_token_type_ids") is not None:
        alone["mm_token_type_ids"] = unpack(batch["mm_token_type_ids"])
    alone_ids = None if ids is None else unpack(ids)
    unpacked = _positions(skeleton, alone, alone_ids, unpack(exists.long()))
    axes = torch.zeros(3, *place.shape, dtype=torch.int64)
    axes[:, exists] = unpacked[:, row, column]
    return torch.cat([one_axis[None], axes.to(one_axis.device)])


def check_packing(skeleton: Skeleton, params: Mapping[str, Tensor]) -> None:
    """Raise where the architecture does not keep conversations of one row apart: tried with a few tokens.

    Raises:
        ValueError: the hidden states of a conversation depend on the one before it in its row.
    """
    module: Any = skeleton.module
    reason = f"{skeleton.name} ({skeleton.config.get('model_type')}) does not keep packed conversations apart"
    todo = "train.packing = false; train.tokens alone works with every model"
    if "position_ids" not in inspect.signature(module.forward).parameters:
        raise ValueError(f"vlm: {reason}, it takes no position_ids; {todo}")
    # Not left to the trial: in 16 bits what leaks through a state may be no more than rounding there.
    if kv_cache.keeps_states(module):
        raise ValueError(f"vlm: {reason}, its layers keep a state of all tokens before; {todo}")
    size = module.get_input_embeddings().weight.shape[0]
    placeholders = {skeleton.config.get(name) for name in ("image_token_id", "video_token_id")}
    text = [token for token in range(min(size, 16)) if token not in placeholders]
    device = next(iter(params.values())).device
    # Two rows: some kernels for packed sequences know only one. A long conversation stands before a short one,
    # where what reaches the second would be seen.
    ids = torch.tensor([text, text[::-1]], device=device)
    first = len(text) - 4
    segments = torch.ones_like(ids)
    segments[:, first:] = 2
    with torch.no_grad():
        packed = hidden_states(skeleton, params, ids=ids, segments=segments)[:, first:]
        alone = hidden_states(skeleton, params, ids=ids[:, first:])
    error = float((packed.double() - alone.double()).norm() / alone.double().norm())
    # 16 bits round in every layer; a leak or a wrong position changes hidden states by tens of percent.
    if not error < (0.1 if alone.dtype in (torch.bfloat16, torch.float16) else 1e-3):
        raise ValueError(f"vlm: {reason}: alone, hidden states differ by {error:.0%}; {todo}")


def _has_three_axes(skeleton: Skeleton) -> bool:
    """Whether transformers' code has positions on three axes; which of them are made here `_MROPE` says."""
    modules = (skeleton.module, getattr(skeleton.module, "model", None))
    return any(hasattr(module, "get_rope_index") for module in modules)


def _check_positions(positions: Tensor, mask: Tensor, three_axes: bool) -> None:
    fits = positions.shape == mask.shape
    if three_axes and positions.dim() == 3:  # transformers also takes 4: text positions before the three axes
        fits = len(positions) in (3, 4) and positions.shape[1:] == mask.shape
    if not fits or positions.is_floating_point():
        shapes = f"{list(mask.shape)}"
        if three_axes:
            shapes += f" or [3, {len(mask)}, {mask.shape[1]}]"
        raise ValueError(f"vlm: position_ids must be whole numbers {shapes}, got {_describe(positions)}")


def _has_mrope(skeleton: Skeleton) -> bool:
    return skeleton.config.get("model_type") in _MROPE


def _check_rows(skeleton: Skeleton, ids: Tensor | None, mask: Tensor) -> None:
    """Check ids against the token table: on a GPU an id outside it would end the process."""
    if not mask.numel():
        raise ValueError(f"vlm: a batch needs rows and tokens, got {list(mask.shape)}")
    low, high = 0, 0
    if ids is not None:
        _check_ids("vlm", ids)
        low, high = int(ids.min()), int(ids.max())
    module: Any = skeleton.module
    size = module.get_input_embeddings().weight.shape[0]
    if low < 0 or high >= size:
        raise ValueError(
            f"vlm: ids must be from 0 to {size - 1}, the token table's last, got {low} to {high}"
        )
    empty = (mask.sum(1) == 0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"vlm: every row needs a token, rows {empty} have none (their mask is all 0)")


def _check_images(skeleton: Skeleton, batch: Mapping[str, Any], ids: Tensor | None) -> None:
    """Check that images and placeholders of a batch belong together."""
    pixels = batch.get("pixel_values")
    token = skeleton.config.get("image_token_id")
    has_embeds = batch.get("inputs_embeds") is not None
    if pixels is not None and (has_embeds or ids is None):
        raise ValueError(
            "vlm: pixel_values go with ids, not with inputs_embeds, which hold their visual tokens already"
        )
    if pixels is not None and not pixels.is_floating_point():
        raise ValueError(
            f"vlm: pixel_values must be floats (normalised, not 0..255), got {_describe(pixels)}"
        )
    if token is None or ids is None or has_embeds:
        return
    per_row = (ids == token).sum(1).tolist()
    placeholders = sum(per_row)
    rows = few([f"row {i} has {n}" for i, n in enumerate(per_row) if n])
    if pixels is None:
        if placeholders:
            raise ValueError(
                f"vlm: {placeholders} image placeholders (id {token}) and no pixel_values: {rows}"
            )
        return
    if not placeholders:
        raise ValueError(
            f"vlm: pixel_values {list(pixels.shape)} and no placeholder (id {token}) in any of {len(ids)} "
            "rows"
        )
    expected = _count_visual_tokens(skeleton, batch, pixels)
    if expected is not None and expected != placeholders:
        raise ValueError(
            f"vlm: the images make {expected} visual tokens, the ids hold {placeholders} placeholders (id "
            f"{token}): {rows}"
        )


def _count_visual_tokens(skeleton: Skeleton, batch: Mapping[str, Any], pixels: Tensor) -> int | None:
    """How many visual tokens the images make; None for an architecture that is not known here."""
    vision = skeleton.config.get("vision_config", {})
    if _has_mrope(skeleton):
        grid = batch.get("image_grid_thw")
        if grid is None:
            raise ValueError(
                f"vlm: {skeleton.name} needs image_grid_thw [n, 3] beside pixel_values: its positions have "
                "three axes"
            )
        # Patches before merging: pixel_values has a row for each.
        patches = int(grid.prod(1).sum())
        if patches != len(pixels):
            raise ValueError(
                f"vlm: image_grid_thw {grid.tolist()} says {patches} patches, pixel_values have {len(pixels)}"
            )
        return patches // vision["spatial_merge_size"] ** 2
    if skeleton.config.get("model_type") == "internvl":
        height, width = pixels.shape[-2:]
        patch_height, patch_width = vision["patch_size"]
        # The pixel shuffle behind the encoder joins patches: with a ratio of 0.5, four to a token.
        patches_of_tile = (height // patch_height) * (width // patch_width)
        return len(pixels) * int(patches_of_tile * skeleton.config["downsample_ratio"] ** 2)
    return None


def _effective_settings(config: Mapping[str, Any], names: set[str]) -> set[str]:
    """Those of the names that this config, or one inside it, sets to a value with an effect."""
    # Configs of vision-language models have that of the text inside them.
    settings = set[str]()
    for name, value in config.items():
        if name in names and value not in _NO_EFFECT:
            settings.add(f"{name} {value}")
        if isinstance(value, Mapping):
            settings |= _effective_settings(value, names)
    return settings


def _check_ids(where: str, ids: Tensor) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{where}: ids must be whole numbers [b, t], got {_describe(ids)}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
