"""One slide and one question for a trained run of slide_vqa: the answer, and the patches that it came
from.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from medvl.base import files
from medvl.base.tree import Tree
from medvl.language import chat, likelihood, system
from medvl.slides.maps import write_map
from medvl.slides.names import slide_name
from medvl.slides.question_formats import SlideConversation
from medvl.slides.relevance import occlusion_attribution, patch_relevance
from medvl.slides.tokens import Features, open_slide, patch_weights, slide_tokens
from medvl.systems.slide_vqa import data, run
from medvl.systems.slide_vqa.assess import answer_conversations
from medvl.systems.slide_vqa.model import Model, encode_slides, with_tokens
from medvl.systems.slide_vqa.record import data_path
from medvl.systems.slide_vqa.tokens import read_mean_token

_log = logging.getLogger("medvl")
_PATCH_SIZE = 256  # level-0 pixels, where neither the file nor the coordinates tell it


def look_at_slide(
    folder: files.PathLike,
    slide: files.PathLike,
    question: str,
    out: files.PathLike = "",
    max_tokens: int = 128,
    *,
    offset: tuple[int, int] = (0, 0),
    opened: tuple[Model, Tree] | None = None,
    cache: files.PathLike = "",
) -> dict[str, Any]:
    """Ask a trained run about one slide; for research, not for diagnosis.

    Args:
        folder: of the run.
        slide: a file of patch features, of any format that is read; `STORE::NAME`; or the name of a slide
            in the run's features.
        out: write the map of where the answer came from into this folder.
        max_tokens: of the answer.
        offset: (x, y) that map.geojson is moved by, as `slide_maps.to_geojson` says.
        opened: from `run.load`; None = it is loaded here.
        cache: folder of the tokens of slides; "" = that of the run.
    Returns:
        "answer", "relevance" [n] of the patches, "coords" [n, 2] or None, "slots" [k] (what each token was
        worth), "patch_size" (level-0 pixels), "map" (its folder).
    Raises:
        ValueError: no question, no such run or file, features of another width or not finite, a run that
            never saw slides.
    """
    if not question.strip():
        raise ValueError("ask: the question must have text, got none")
    folder = Path(folder)
    model, params = opened or run.load(folder)
    features = open_slide(slide, data_path(model.cfg, "features"), dims=model.compress.dim)
    data.check_encoder(folder, features)
    tokens = slide_tokens(model.compress, model.compressor, features, cache or folder / "tokens")
    # A conversation ends with an answer, which the prompt leaves out: here it is empty.
    turns = {"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": ""}
    conversation = SlideConversation(messages=turns, slides=features.names)
    # A question of a user has no options: it is answered by text, however the run was evaluated.
    by_text = evolve(model.cfg, evaluate=evolve(model.cfg.evaluate, by="text", max_tokens=max_tokens))
    (answer,) = answer_conversations(evolve(model, cfg=by_text), params, [conversation], tokens)
    mean = read_mean_token(folder, model)
    slots = relevance_of_slots(model, params, conversation, answer, tokens, mean)
    (name,) = features.names
    weights, coords = patch_weights(model.compress, model.compressor, features, name)
    # A slot that spoke against the answer is not where it came from: its patches count 0.
    relevance = patch_relevance(weights, slots, sign="positive")
    size = _patch_size(features, name, coords)
    result = {
        "answer": answer,
        "relevance": relevance,
        "coords": coords,
        "slots": slots,
        "patch_size": size,
        "map": "",
    }
    if out:
        # Of STORE.h5::NAME the name.
        map_name = slide_name(str(slide).rpartition("::")[2])
        result["map"] = str(write_map(out, map_name, relevance, weights, coords, size, offset=offset))
    return result


def _patch_size(features: Features, name: str, coords: np.ndarray | None) -> int:
    """The side of a patch in level-0 pixels."""
    size = features.patch_size(name)
    if size is None and coords is not None:
        _log.warning(
            "%s: does not give its patch size, and it cannot be inferred from one patch; drawn as %d level-0 "
            "pixels",
            name,
            _PATCH_SIZE,
        )
    return size or _PATCH_SIZE


def relevance_of_slots(
    model: Model,
    params: Tree,
    conversation: SlideConversation,
    answer: str,
    tokens: Mapping[str, Tensor],
    mean: Tensor,
) -> np.ndarray:
    """What each token of a slide was worth for this answer, [k] in nats.

    It is by how much the answer's log-likelihood drops when that token is the mean of all training slides'
    instead. A token as every slide has it is worth nothing.

    Args:
        conversation: about one slide; its last answer is not looked at.
        tokens: {slide: [k, d]}.
        mean: [k, d], from `tokens.read_mean_token`.
    """
    (slide,) = conversation.slides
    language = with_tokens(model, tokens)
    skeleton, weights = language.chat.skeleton, system.model_weights(language, params)
    prompts = encode_slides(model.cfg, language.chat, [conversation], prompt=True)
    batch = chat.make_batch(language.chat, prompts, [0], side="left")
    # The same text with the mean slide: what the projector makes of it is the baseline, in the space of
    # embeddings that `score` replaces.
    mean_batch = chat.make_batch(with_tokens(model, {slide: mean}).chat, prompts, [0], side="left")
    # Embedded once: the k + 1 variants differ from this prompt in one visual token at most.
    with torch.no_grad():
        inputs = chat.model_inputs(language.chat, weights, batch, params)
        mean_inputs = chat.model_inputs(language.chat, weights, mean_batch, params)
    embedded, mask = inputs["inputs_embeds"], inputs["mask"]
    # Positions of the k visual tokens in the prompt, [k].
    places = batch["visual"][0].nonzero()[:, 0].to(embedded.device)
    # An empty answer has no likelihood; any text must stand for it.
    ids = language.chat.tokenizer(answer or "-", add_special_tokens=False)["input_ids"]

    def score(variants: Tensor) -> Tensor:
        """Log-likelihoods [b] of the answer behind the prompt with other visual tokens [b, k, d]."""
        b = len(variants)
        variant_inputs = {
            "inputs_embeds": embedded.repeat(b, 1, 1).index_copy(1, places, variants),
            "mask": mask.repeat(b, 1),
        }
        # Sums over the tokens of the answer, [b, options]; each row has one option.
        return likelihood.score_options(skeleton, weights, variant_inputs, [[ids]] * b)[0][:, 0]

    worth = occlusion_attribution(score, embedded[0, places], mean_inputs["inputs_embeds"][0, places])
    return worth.cpu().double().numpy()
