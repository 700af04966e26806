"""The model of slide_vqa: a language model that sees slides as the projected tokens of a frozen
compressor.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from attrs import evolve, frozen
from torch import Generator, Tensor

from medvl.base.tree import Tree, map_leaves
from medvl.components.project import ProjectConfig, init_project, project
from medvl.components.slots import CompressConfig
from medvl.language import chat, system
from medvl.language.chat import Chat, Encoded
from medvl.language.system import LanguageModel
from medvl.language.templates import QWEN_VL
from medvl.language.vision import Batch, Vision, item_range
from medvl.slides.question_formats import TAG, SlideConversation
from medvl.slides.reference_files import read_compressor, read_projector
from medvl.systems.slide_vqa.record import Config
from medvl.weights import shards


@frozen(kw_only=True, eq=False)
class Model:
    """Everything but the weights that are trained."""

    cfg: Config
    language: LanguageModel  # sees the slides that `with_tokens` gave it
    compress: CompressConfig  # as the compressor is, where it came from a file
    compressor: Tree  # frozen; {} before it is trained


def open_compressor(cfg: Config) -> tuple[CompressConfig, Tree]:
    """The trained compressor of `pretrain.file`; its sizes are the file's."""
    # What the file cannot say comes from the record: to how many slots a patch goes, noise and dropout.
    sizes, params, _ = read_compressor(cfg.pretrain.file, top_k=cfg.compress.top_k)
    return evolve(sizes, noise=cfg.compress.noise, dropout=cfg.compress.dropout), params


def init_model(
    cfg: Config,
    folder: Path,
    compress: CompressConfig,
    texts: Sequence[str] = (),
    *,
    device: torch.device = torch.device("cpu"),
) -> tuple[LanguageModel, Tree]:
    """The language model and starting weights {"model", "projector", "lora"}; it has seen no slide yet.

    Args:
        compress: sizes of the compressor.
        texts: what a tokenizer is trained on, if the model has none.
        device: "meta" makes no weights, for an estimate.
    """

    def add_projector(opened: Chat, params: Tree, gen: Generator) -> tuple[Chat, Tree]:
        # The table of token embeddings is [vocabulary, width]; the projector has to end at that width.
        width = params["model"][chat.token_table(opened)].shape[1]
        sizes, projector = _make_projector(cfg, compress.dim, width, gen)
        projector = map_leaves(lambda t: t.to(device), projector)
        return evolve(opened, vision=slide_vision(sizes, compress)), params | {"projector": projector}

    # Answers are letters, so that the tokenizer tells A from a.
    return system.init_model(cfg, folder, texts, device=device, lower=False, extend=add_projector)


def _make_projector(cfg: Config, inputs: int, outputs: int, gen: Generator) -> tuple[ProjectConfig, Tree]:
    """The projector of `cfg.projector`, or a new one."""
    if not cfg.projector:
        sizes = ProjectConfig(inputs=inputs, hidden=cfg.hidden, outputs=outputs)
        return sizes, init_project(sizes, gen)
    sizes, projector = read_projector(cfg.projector)
    # A projector belongs to one compressor (inputs) and one language model (outputs).
    if (sizes.inputs, sizes.outputs) != (inputs, outputs):
        raise ValueError(
            f"{cfg.projector}: maps {sizes.inputs} to {sizes.outputs}; tokens have {inputs}, the model "
            f"{outputs}"
        )
    return sizes, projector


def slide_vision(sizes: ProjectConfig, compress: CompressConfig) -> Vision:
    """Slides as visual tokens: those of the compressor, projected into the width of the language model.

    Any slide is shown as zeros, which is enough to count and to estimate, until `with_tokens` gives the
    tokens.

    Args:
        sizes: of the projector, whose weights are params["projector"].
    """

    def select_rows(batch: Batch, rows: slice) -> dict[str, Tensor]:
        # Slides of all rows lie behind each other, and a row may have several or none: rows of a micro-batch
        # are not rows of `tokens`.
        first, stop = item_range(batch, rows)
        return {"tokens": batch["tokens"][first:stop]}

    def embed(params: Tree, batch: Batch) -> Tensor:
        # [slides, k, d] to [slides, k, width]; then one row per placeholder, in their order in the text.
        projected = project(sizes, shards.lazy_shards(params["projector"]), batch["tokens"])
        return projected.flatten(0, 1)

    return Vision(
        # Qwen's vocabulary has these tokens, so that its table is not resized.
        placeholder=QWEN_VL,
        count_tokens=lambda slide: compress.slots,
        load_items=lambda slides: {"tokens": torch.zeros(len(slides), compress.slots, compress.dim)},
        select_rows=select_rows,
        embed=embed,
    )


def with_tokens(model: Model, tokens: Mapping[str, Tensor]) -> LanguageModel:
    """The language model that sees these slides, {slide: tokens [k, d]}."""

    def load_items(slides: Sequence[str]) -> dict[str, Tensor]:
        # `torch.stack` refuses an empty list, and a batch whose questions show no slide has one.
        if not slides:
            return {"tokens": torch.zeros(0, model.compress.slots, model.compress.dim)}
        return {"tokens": torch.stack([tokens[slide] for slide in slides])}

    opened = model.language.chat
    assert opened.vision is not None
    vision = evolve(opened.vision, load_items=load_items)
    return evolve(model.language, chat=evolve(opened, vision=vision))


def encode_slides(
    cfg: Config, opened: Chat, conversations: Sequence[SlideConversation], *, prompt: bool = False
) -> Encoded:
    """Token ids of conversations, `slots` placeholders for each slide; without slides where the record is
    blind.
    """
    if cfg.data.blind:
        conversations = [without_slides(conversation) for conversation in conversations]
    return chat.encode_conversations(opened, conversations, prompt=prompt)


def without_slides(conversation: SlideConversation) -> SlideConversation:
    """The conversation without its slides."""
    # The tag has a line of its own, whose break goes with it.
    messages = [
        message | {"content": message["content"].replace(f"{TAG}\n", "")} for message in conversation.messages
    ]
    return evolve(conversation, slides=(), messages=tuple(messages))
