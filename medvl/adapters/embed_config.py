"""Settings of embedders: how a query becomes a vector."""

from math import isfinite
from typing import Literal

from attrs import frozen

from medvl.base import config
from medvl.language.images import check_window

# Settings that change the vectors, and so belong to the name of an embedder.
NAMED_SETTINGS = {
    "local": ("dims", "shares", "max_images", "max_pixels"),
    "text": ("instruction", "pool", "dims", "context"),
    "image_text": ("instruction", "dims", "context", "shares", "max_images", "max_pixels"),
}


@frozen(kw_only=True)
class EmbedConfig:
    """How a query becomes a vector.

    "local" is fitted to texts and images (`fit_local`); "text" and "image_text" (CLIP, SigLIP) are encoders
    of the hub. Texts or images whose share is 0 are not used; a query with only one of them takes that alone.
    """

    kind: Literal["local", "text", "image_text"] = "local"
    name: str = ""  # folder or hub name of the encoder
    # Of encoders: before every text, such as "Represent the sentence for similar task retrieval: ".
    instruction: str = ""
    pool: Literal["first", "last", "mean", "max"] = "mean"  # of "text": the one the encoder was trained with
    # The first dims of a Matryoshka embedding, 0 = all; of "local": components of texts and of images at
    # most, 0 = 64.
    dims: int = 0
    context: int = 512  # tokens; an encoder with fewer positions takes as many as it has
    shares: tuple[float, float] = (0.7, 0.3)  # of text and of images
    max_images: int = 2  # the first images of a query are used, up to so many
    max_pixels: int = 100_000  # larger images are made smaller before they are encoded
    # (black, white): the greys of 16-bit and DICOM images that are shown as 0 and 255.
    window: tuple[float, ...] = ()
    batch: int = 32

    def __attrs_post_init__(self) -> None:
        if self.kind not in NAMED_SETTINGS or self.pool not in ("first", "last", "mean", "max"):
            raise ValueError(
                f"EmbedConfig: kind must be one of {', '.join(NAMED_SETTINGS)}, pool first, last, mean or "
                f"max, got {self}"
            )
        is_encoder = self.kind in ("text", "image_text")
        if is_encoder != bool(self.name) or (self.instruction and not is_encoder):
            raise ValueError(
                "EmbedConfig: 'text' and 'image_text' need a name, 'local' has none, only they have an "
                "instruction, "
                f"got {self}"
            )
        if self.dims < 0 or self.context < 3 or min(self.max_images, self.max_pixels, self.batch) < 1:
            raise ValueError(
                "EmbedConfig: dims must be >= 0, context >= 3, max_images, max_pixels and batch >= 1, "
                f"got {self}"
            )
        are_shares = len(self.shares) == 2 and all(isfinite(share) and share >= 0 for share in self.shares)
        if not are_shares or not any(self.shares):
            raise ValueError(f"EmbedConfig: shares must be two numbers >= 0, one above 0, got {self.shares}")
        config.check_bounds(
            self,
            "EmbedConfig",
            dims=config.WIDTH_OR_NONE,
            context=(3, 2**20),
            batch=(1, 2**20),
            shares=(0, 1e6),
        )
        config.check_bounds(self, "EmbedConfig", max_images=(1, 2**20), max_pixels=(1, 2**28))
        check_window(self.window, "EmbedConfig.window")
