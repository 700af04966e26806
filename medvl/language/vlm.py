"""The language side that all systems share: visual tokens in the place of placeholders, hidden states, the loss of answers."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl.base.text import few
from medvl.components import losses
from medvl.hub.skeletons import Skeleton
from medvl.language import qwen_vl
from medvl.weights import lazy

_MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # families whose three-axis positions `qwen_vl.mrope` makes
# What architectures do to logits behind the head, by the names of their configs; these values mean that they do nothing.
_BEHIND_HEAD = {
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
}
_BEHIND_HEAD |= {"lm_head_multiplier", "output_multiplier", "output_multiplier_scale"}
_NOTHING = (None, 1, 1.0)
_SEEN = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "inputs_embeds",
)  # what may hold images


def splice(
    ids: Tensor, visual: Tensor, embedding: Tensor, token: int, *, counts: Sequence[int] | None = None
) -> Tensor:
    """Embed a text whose placeholders are replaced by visual tokens, row by row and in each from left to right.

    Args:
        ids: [b, t] with `token` once for every visual token; any number of images, anywhere, in any of the rows.
        visual: [n, d], the visual tokens of all rows one after the other.
        embedding: weight of the token table [v, d], any kind of weight.
        token: id of the placeholder; it need not be in the table.
        counts: how many visual tokens each row should have; with it, errors of two rows cannot make up for each other.
    Returns:
        [b, t, d] of the table's dtype; gradients reach `visual` and the table.
    Raises:
        ValueError: placeholders and visual tokens differ in number (says in which rows), other shapes or dtypes.
    """
    _check_ids("splice", ids)
    if visual.dim() != 2 or not visual.is_floating_point() or visual.shape[1] != embedding.shape[1]:
        raise ValueError(
            f"splice: visual must be floats [n, {embedding.shape[1]}], got {_about(visual)}; project to the table's width"
        )
    place = ids == token
    found = place.sum(1).tolist()
    if counts is not None:
        if len(counts) != len(found):
            raise ValueError(
                f"splice: counts must be one number per row, got {len(counts)} for {len(found)} rows"
            )
        if wrong := [
            f"row {i} has {n} for {c}" for i, (n, c) in enumerate(zip(found, counts, strict=True)) if n != c
        ]:
            raise ValueError(
                f"splice: every row must hold one placeholder (id {token}) per visual token; {few(wrong)}"
            )
    if sum(found) != len(visual):
        rows = few([f"row {i} has {n}" for i, n in enumerate(found)])
        raise ValueError(
            f"splice: {sum(found)} placeholders (id {token}) meet {len(visual)} visual tokens: {rows}"
        )
    text = F.embedding(ids.masked_fill(place, 0), embedding)
    return text.masked_scatter(place[..., None], visual.to(text.dtype))


def visual_rows(ids: Tensor, token: int) -> Tensor:
    """Which sample each visual token belongs to, int64 [n]: what `weights.low_rank(rows=...)` needs in a vision tower.

    Args:
        ids: [b, t] with the placeholder `token` once for every visual token.
    Raises:
        ValueError: ids are not whole numbers [b, t].
    """
    _check_ids("visual_rows", ids)
    return torch.arange(len(ids), device=ids.device).repeat_interleave((ids == token).sum(1))


def language_head_names(skeleton: Skeleton) -> tuple[str, str | None]:
    """The names in params of the language head's weight and bias (None where it has none); a tied head has the token table's name.

    Raises:
        ValueError: there is no head (load with head="language"), or the logits are more than hidden states times head.
    """
    module: Any = skeleton.module
    kind = skeleton.config.get("model_type")
    if behind := sorted(_settings(skeleton.config, _BEHIND_HEAD)):
        raise ValueError(
            f"language_head_names: logits of {kind} are more than hidden states times head ({', '.join(behind)}); it cannot be split off"
        )
    if kind == "chameleon":
        raise ValueError(
            "language_head_names: chameleon masks logits behind its head; it cannot be split off"
        )
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError(
            f"language_head_names: {skeleton.name} ({kind}) has no language head; load it with head='language'"
        )
    names = {id(p): n for n, p in module.named_parameters()}
    bias = getattr(head, "bias", None)
    return names[id(head.weight)], None if bias is None else names[id(bias)]


def model_inputs(skeleton: Skeleton, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch in the house's names as the keyword arguments of the skeleton's call; positions always explicit.

    Positions count the tokens that exist, so padding may be on either side. Those of Qwen-VL have three axes: they are taken from
    "position_ids", or made from "image_grid_thw" and the placeholders; what transformers keeps of an earlier call is never read.

    Args:
        batch: "ids" [b, t] or "inputs_embeds" [b, t, d] (from `splice`; then "ids" are optional); "mask" [b, t], 1 where a token exists
            (all do if left out); "position_ids" [b, t] or [3, b, t]; "mm_token_type_ids" [b, t]; "pixel_values", "image_grid_thw" and
            whatever else the architecture takes. "labels", "visual" and "images" are left out.
    Raises:
        ValueError: a row without tokens, ids outside the table, images without placeholders or the other way round, another number of
            placeholders than the images need, positions that cannot be known, unknown names.
    """
    ids, embeds, mask = batch.get("ids"), batch.get("inputs_embeds"), batch.get("mask")
    if ids is None and embeds is None:
        raise ValueError(
            f"vlm: a batch needs ids [b, t] or inputs_embeds [b, t, d], got only {', '.join(sorted(batch)) or 'nothing'}"
        )
    if embeds is not None and (
        embeds.dim() != 3
        or not embeds.is_floating_point()
        or (ids is not None and ids.shape != embeds.shape[:2])
    ):
        raise ValueError(
            f"vlm: inputs_embeds must be floats [b, t, d], with [b, t] as of ids if there are any, got {_about(embeds)}"
        )
    like: Tensor = ids if embeds is None else embeds[..., 0]  # type: ignore[assignment]
    mask = torch.ones_like(like, dtype=torch.int64) if mask is None else mask
    if mask.shape != like.shape or mask.is_floating_point():
        raise ValueError(
            f"vlm: mask must be bool or whole numbers {list(like.shape)}, 1 where a token exists, got {_about(mask)}"
        )
    mask = mask.long()
    _check_rows(skeleton, ids if embeds is None else None, mask)
    _check_images(skeleton, batch, ids)
    given = {
        k: v
        for k, v in batch.items()
        if k not in ("ids", "mask", "labels", "visual", "images", "position_ids") and v is not None
    }
    takes = inspect.signature(skeleton.module.forward).parameters
    if unknown := sorted(given.keys() - takes.keys() - {"mm_token_type_ids"}):
        raise ValueError(
            f"vlm: {skeleton.name} takes no {', '.join(unknown)}; it takes {', '.join(sorted(takes.keys() - {'kwargs'}))}"
        )
    positions = _positions(skeleton, batch, ids, mask)
    given |= {"attention_mask": mask} | ({"input_ids": ids} if embeds is None else {})
    if "mm_token_type_ids" not in takes or _mrope(skeleton):  # said by the positions
        given.pop("mm_token_type_ids", None)
    return given | ({"position_ids": positions} if "position_ids" in takes else {})


def hidden_states(skeleton: Skeleton, params: Mapping[str, Tensor], **batch: Any) -> Tensor:
    """The last hidden states [b, t, d], those that the language head would get.

    Args:
        batch: as of `model_inputs`.
    Raises:
        ValueError: as `model_inputs` and `language_head_names`.
    """
    name, _ = language_head_names(skeleton)
    return skeleton(
        {**params, name: lazy.passed(params[name])}, **model_inputs(skeleton, batch), use_cache=False
    ).logits


def answer_loss(
    skeleton: Skeleton, params: Mapping[str, Tensor], batch: Mapping[str, Any], *, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the tokens that are trained, summed, and their number; logits of at most `chunk` tokens exist at a time.

    Args:
        batch: as of `model_inputs`, and "labels" int64 [b, t], not shifted: -100 where a token is not trained, else its id.
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
    hidden, head = hidden_states(skeleton, params, **batch), params[name]
    if isinstance(head, lazy.Sharded):  # gathered once: processes have different numbers of chunks
        head = lazy.dense(head)
    return losses.token_cross_entropy(
        hidden, head, labels, bias=None if bias is None else params[bias], chunk=chunk
    )


# Checks ---------------------------------------------------------------------------------------------------------------------------------
def _positions(skeleton: Skeleton, batch: Mapping[str, Any], ids: Tensor | None, mask: Tensor) -> Tensor:
    given = batch.get("position_ids")
    several = any(
        hasattr(m, "get_rope_index") for m in (skeleton.module, getattr(skeleton.module, "model", None))
    )
    if given is not None:
        fits = given.shape == mask.shape or (
            several and given.dim() == 3 and len(given) in (3, 4) and given.shape[1:] == mask.shape
        )
        if not fits or given.is_floating_point():
            want = f"{list(mask.shape)}{f' or [3, {len(mask)}, {mask.shape[1]}]' if several else ''}"
            raise ValueError(f"vlm: position_ids must be whole numbers {want}, got {_about(given)}")
        return given
    plain = (mask.cumsum(1) - 1).clamp(min=0)
    seen = [
        k
        for k in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "inputs_embeds")
        if batch.get(k) is not None
    ]
    if not several:
        return plain
    if not seen and ids is not None:
        return plain.expand(3, -1, -1)
    kinds, grid = batch.get("mm_token_type_ids"), batch.get("image_grid_thw")
    if kinds is None and ids is not None and _mrope(skeleton):
        kinds = qwen_vl.token_types(ids, skeleton.config["image_token_id"], skeleton.config["video_token_id"])
    if not _mrope(skeleton) or grid is None or kinds is None or any("video" in k for k in seen):
        raise ValueError(
            f"vlm: {skeleton.name} has positions on three axes; with {', '.join(seen)} it needs position_ids [3, b, t] (qwen_vl.mrope), "
            "or image_grid_thw and ids (or mm_token_type_ids): without them transformers would count on one axis"
        )
    merge = skeleton.config["vision_config"]["spatial_merge_size"]
    return qwen_vl.mrope(kinds, mask.bool(), grid, image_token=1, video_token=2, merge=merge)[0]


def _mrope(skeleton: Skeleton) -> bool:
    return skeleton.config.get("model_type") in _MROPE


def _check_rows(skeleton: Skeleton, ids: Tensor | None, mask: Tensor) -> None:
    """One look at the values, since on a GPU an id outside the table would end the process."""
    if not mask.numel():
        raise ValueError(f"vlm: a batch needs rows and tokens, got {list(mask.shape)}")
    if ids is not None:
        _check_ids("vlm", ids)
    low, high = (0, 0) if ids is None else torch.stack([ids.min(), ids.max()]).tolist()
    module: Any = skeleton.module
    size = module.get_input_embeddings().weight.shape[0]
    if low < 0 or high >= size:
        raise ValueError(
            f"vlm: ids must be from 0 to {size - 1}, the token table's last, got {low} to {high}"
        )
    if empty := (mask.sum(1) == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"vlm: every row needs a token, rows {empty} have none (their mask is all 0)")


def _check_images(skeleton: Skeleton, batch: Mapping[str, Any], ids: Tensor | None) -> None:
    pixels, token = batch.get("pixel_values"), skeleton.config.get("image_token_id")
    if pixels is not None and (batch.get("inputs_embeds") is not None or ids is None):
        raise ValueError(
            "vlm: pixel_values go with ids, not with inputs_embeds, which hold their visual tokens already"
        )
    if pixels is not None and not pixels.is_floating_point():
        raise ValueError(f"vlm: pixel_values must be floats (normalised, not 0..255), got {_about(pixels)}")
    if token is None or ids is None or batch.get("inputs_embeds") is not None:
        return
    found = (ids == token).sum(1).tolist()
    rows = few([f"row {i} has {n}" for i, n in enumerate(found) if n])
    if pixels is None:
        if sum(found):
            raise ValueError(f"vlm: {sum(found)} image placeholders (id {token}) and no pixel_values: {rows}")
        return
    if not sum(found):
        raise ValueError(
            f"vlm: pixel_values {list(pixels.shape)} and no placeholder (id {token}) in any of {len(ids)} rows"
        )
    need = _visual_tokens(skeleton, batch, pixels)
    if need is not None and need != sum(found):
        raise ValueError(
            f"vlm: the images make {need} visual tokens, the ids hold {sum(found)} placeholders (id {token}): {rows}"
        )


def _visual_tokens(skeleton: Skeleton, batch: Mapping[str, Any], pixels: Tensor) -> int | None:
    """How many visual tokens the images make, where the architecture is one we know."""
    vision = skeleton.config.get("vision_config", {})
    if _mrope(skeleton):
        grid = batch.get("image_grid_thw")
        if grid is None:
            raise ValueError(
                f"vlm: {skeleton.name} needs image_grid_thw [n, 3] beside pixel_values: its positions have three axes"
            )
        patches = int(grid.prod(1).sum())
        if patches != len(pixels):
            raise ValueError(
                f"vlm: image_grid_thw {grid.tolist()} says {patches} patches, pixel_values have {len(pixels)}"
            )
        return patches // vision["spatial_merge_size"] ** 2
    if skeleton.config.get("model_type") == "internvl":
        h, w = (n // p for n, p in zip(pixels.shape[-2:], vision["patch_size"], strict=True))
        return len(pixels) * int(h * w * skeleton.config["downsample_ratio"] ** 2)
    return None


def _settings(config: Mapping[str, Any], names: set[str]) -> set[str]:
    """Those of the names that this config, or one inside it, sets to something."""
    found = {f"{k} {v}" for k, v in config.items() if k in names and v not in _NOTHING}
    return found.union(*(_settings(v, names) for v in config.values() if isinstance(v, Mapping)))


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: ids must be whole numbers [b, t], got {_about(ids)}")


def _about(t: Tensor) -> str:
    return f"{str(t.dtype)[6:]} {list(t.shape)}"
