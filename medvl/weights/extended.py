"""Token tables and heads with more rows than a model was trained with: the old ones stay, the new are trained."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medvl.weights.lazy import Lazy, dense


class Extended(Lazy):
    """The first `keep` rows of `base`, then `rows`: nothing of the base is copied, and gradients need not reach
    it. Made by `extend_table`.
    """

    _parts = ("base", "rows")
    base: Tensor
    rows: Tensor
    keep: int

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        old_bias = new_bias = None
        if bias is not None:
            old_bias, new_bias = bias[: self.keep], bias[self.keep :]
        if isinstance(self.base, Lazy):
            # Such a weight cannot be cut, but what it makes of x can.
            old = F.linear(x, self.base)[..., : self.keep]
            old = old if old_bias is None else old + old_bias
        else:
            old = F.linear(x, self.base[: self.keep], old_bias)
        # Under autocast F.linear casts by itself; without it, the rows may be float32 beside a bfloat16 base.
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.rows.dtype)
            new_bias = None if new_bias is None else new_bias.to(x.dtype)
        new = F.linear(x, self.rows, new_bias)
        return torch.cat([old, new.to(old.dtype)], -1)

    def embedding(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Both are looked up for every id, of which one counts: nothing depends on values, so nothing waits.
        is_new = ids >= self.keep
        old = F.embedding(ids.masked_fill(is_new, 0), self.base, *args, **kwargs)
        new = F.embedding((ids - self.keep).masked_fill(~is_new, 0), self.rows)
        # An estimate, whose weights are on "meta", embeds ids of the CPU.
        return torch.where(is_new[..., None].to(old.device), new.to(old.dtype), old)

    def dense(self) -> Tensor:
        old = dense(self.base)[: self.keep]
        return torch.cat([old, self.rows.to(old.dtype)])

    def _about(self) -> str:
        base = self.base if isinstance(self.base, Lazy) else str(self.base.dtype)[6:]
        return f"{list(self.shape)}, {len(self.rows)} rows behind {self.keep} of {base}"


def extend_table(base: Tensor, rows: Tensor, keep: int) -> Tensor:
    """A token table or the weight of a head with `rows` behind its first `keep` rows.

    Args:
        base: [v, d], of any kind of weight.
        rows: [n, d], of any float dtype; results have the base's.
        keep: the number of tokens of the base's tokenizer. Rows behind these, such as Phi-3's padding of its
            table, are not used.
    Returns:
        a lazy weight [keep + n, d] for `F.embedding` and `F.linear`.
    Raises:
        ValueError: widths that differ, or more rows to keep than there are.
    """
    if base.dim() != 2 or rows.dim() != 2 or rows.shape[1] != base.shape[1] or not 0 < keep <= len(base):
        raise ValueError(
            f"extend_table: rows [n, d] must fit a table [v, d] of which v or less are kept, got "
            f"{list(rows.shape)} for {list(base.shape)} and keep {keep}"
        )
    shape = (keep + len(rows), base.shape[1])
    return Extended.like(shape, base.dtype, base.device, base=base, rows=rows, keep=keep)


def extend_tables(
    params: Mapping[str, Tensor], names: Mapping[str, str], rows: Mapping[str, Tensor], keep: int
) -> dict[str, Tensor]:
    """The params of a language model with `rows` behind its token table and its head, as `extend_table`.

    Args:
        names: {"embed", "head"}: names in params, from `skeletons.table_names`.
        rows: {"embed", "head"}: [n, d] each; a part that is left out stays as it is.
    Raises:
        ValueError: as `extend_table`; one weight is both table and head.
    """
    if names["embed"] == names["head"]:
        raise ValueError(
            f"extend_tables: {names['embed']} must be the token table alone, but is the head, too; give the "
            "head a weight of its own first (skeletons.untie)"
        )
    extended = dict(params)
    for part, tensor in rows.items():
        extended[names[part]] = extend_table(params[names[part]], tensor, keep)
    return extended


def mean_rows(base: Tensor, keep: int, number: int) -> Tensor:
    """Rows [number, d] for tokens that nothing is known of yet: the mean of the first `keep` rows of the table,
    as a view of one row; clone it to train it.

    Source: public code of HealthGPT, `llava/demo/utils.py`, `add_special_tokens_and_resize_model`.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    mean = dense(base)[:keep].mean(0, keepdim=True, dtype=dtype)
    return mean.to(base.dtype).expand(number, -1)
