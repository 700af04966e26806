"""Settings of the training of what adapters are retrieved by."""

from math import isfinite
from typing import Literal

from attrs import frozen

from medvl.base import config


@frozen(kw_only=True)
class RetrieverConfig:
    """How a head behind an embedder is made, how long and how fast it is trained, and on what batches."""

    # "contrast": `head.train_retriever`; "whiten": `head.whiten_tasks`, which takes only `shrink`.
    kind: Literal["none", "contrast", "whiten"] = "contrast"
    shrink: float = 0.1
    steps: int = 1000
    lr: float = 3e-3  # its highest; falls along a half cosine
    weight_decay: float = 0.0  # of a head towards the embedder itself, of an encoder's matrices towards 0
    temperature: float = 0.05
    negatives: int = 16  # samples of other tasks against every anchor
    batch: int = 64  # anchors
    dims: int = 0  # width of a head's output; 0 = as wide as the vectors
    every: int = 50  # steps from one validation to the next, where tasks are held out
    chunk: int = 0  # samples encoded at a time, for the memory of a large encoder; 0 = all of a batch
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        least = {"steps": 0, "negatives": 1, "batch": 1, "dims": 0, "every": 1, "chunk": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            # bool is a kind of int to Python, and True would pass for 1.
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"RetrieverConfig: {name} must be a whole number >= {low}, got {value!r}")
        if self.kind not in ("none", "contrast", "whiten") or not isfinite(self.shrink) or self.shrink <= 0:
            raise ValueError(
                "RetrieverConfig: kind must be none, contrast or whiten and shrink > 0, got "
                f"{self.kind!r}, {self.shrink}"
            )
        if not isfinite(self.temperature) or self.temperature <= 0:
            raise ValueError(
                f"RetrieverConfig: temperature must be finite and above 0, got {self.temperature}"
            )
        if not (isfinite(self.lr) and self.lr > 0 and isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(
                f"RetrieverConfig: needs lr > 0 and weight_decay >= 0, got {self.lr} and {self.weight_decay}"
            )
        config.check_bounds(
            self,
            "RetrieverConfig",
            steps=config.COUNT_OR_NONE,
            every=config.COUNT,
            batch=(1, 2**20),
            chunk=(0, 2**20),
        )
        config.check_bounds(
            self, "RetrieverConfig", negatives=(1, 2**20), dims=config.WIDTH_OR_NONE, seed=config.SEED
        )
        config.check_bounds(
            self,
            "RetrieverConfig",
            lr=config.RATE,
            weight_decay=(0, 1e6),
            shrink=(0, 1e6),
            temperature=(0, 1e6),
        )
