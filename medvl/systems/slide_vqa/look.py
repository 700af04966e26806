"""One slide and one question for a trained run of slide_vqa: the answer, and the patches that it came from."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from medvl.base import files
from medvl.base.tree import Tree
from medvl.language import generate
from medvl.slides.maps import write_map
from medvl.slides.names import slide_name
from medvl.slides.question_formats import SlideConversation
from medvl.slides.relevance import occlusion_attribution, patch_relevance
from medvl.slides.tokens import open_slide, patch_weights, slide_tokens
from medvl.systems.slide_vqa import model as slide_vqa
from medvl.systems.slide_vqa import run
from medvl.systems.slide_vqa.model import Model

_log = logging.getLogger("medvl")


def look_at_slide(
    folder: files.PathLike,
    slide: files.PathLike,
    question: str,
    out: files.PathLike = "",
    most: int = 128,
    *,
    offset: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    """Ask a trained run about one slide; for research, not for diagnosis.

    Args:
        folder: of the run.
        slide: a file of patch features, of any format that is read; `STORE::NAME`; or the name of a slide in the run's features.
        out: write the map of where the answer came from into this folder.
        most: tokens of the answer.
        offset: (x, y) that map.geojson is moved by, as `slide_maps.to_geojson` says.
    Returns:
        "answer", "relevance" [n] of the patches, "coords" [n, 2] or None, "slots" [k] (what each token was worth), "map" (its folder).
    Raises:
        ValueError: no question, no such run or file, features of another width or not finite, a run that never saw slides.
    """
    if not question.strip():
        raise ValueError("ask: the question must have text, got none")
    folder = Path(folder)
    model, params = run.load(folder)
    of = open_slide(slide, slide_vqa.path(model.cfg, "features"), dims=model.compress.dim)
    run.check_encoder(folder, of)
    tokens = slide_tokens(model.compress, model.compressor, of, folder / "tokens")
    turns = {"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": ""}
    talk = SlideConversation(messages=turns, slides=of.names)
    how = evolve(model.cfg.evaluate, max_tokens=most, by="text")
    (said,) = run.answer(evolve(model, cfg=evolve(model.cfg, evaluate=how)), params, [talk], tokens)
    slots = relevance_of_slots(model, params, talk, said, tokens, run.mean_token(folder, model))
    weights, coords = patch_weights(model.compress, model.compressor, of, of.names[0])
    relevance = patch_relevance(weights, slots, sign="positive")
    found = {"answer": said, "relevance": relevance, "coords": coords, "slots": slots, "map": ""}
    if out:
        size = of.patch_size(of.names[0])
        if size is None and coords is not None:
            _log.warning(
                "%s: does not say its patch size, and one patch does not show it; drawn as 256 level-0 pixels",
                slide,
            )
        name = slide_name(str(slide).rpartition("::")[2])
        found["map"] = str(write_map(out, name, relevance, weights, coords, size or 256, offset=offset))
    return found


def relevance_of_slots(
    model: Model, params: Tree, talk: SlideConversation, said: str, tokens: dict[str, Tensor], mean: Tensor
) -> np.ndarray:
    """What each token of a slide was worth for this answer, [k] in nats: by how much the answer's log-likelihood drops when that token is
    the mean of all training slides' instead. A token as every slide has it is worth nothing.

    Args:
        talk: a conversation about one slide; its last answer is not looked at.
        tokens: {slide: [k, d]}.
        mean: [k, d], from `slide_vqa_run.mean_token`.
    """
    data = slide_vqa.encode(model, [talk], prompt=True)
    weights = slide_vqa.weights_of(model, params)
    batches = [
        slide_vqa.collate(model, data, of, [0], side="left") for of in (tokens, {talk.slides[0]: mean})
    ]
    with torch.no_grad():
        own, usual = (slide_vqa.inputs_of(model, params, weights, batch) for batch in batches)
    places = batches[0]["visual"][0].nonzero()[:, 0].to(own["mask"].device)
    ids = model.chat.tokenizer(said or "-", add_special_tokens=False)["input_ids"]

    def score(variants: Tensor) -> Tensor:
        b = len(variants)
        embeds = own["inputs_embeds"].repeat(b, 1, 1).index_copy(1, places, variants)
        inputs = {"inputs_embeds": embeds, "mask": own["mask"].repeat(b, 1)}
        return generate.score_options(model.chat.skeleton, weights, inputs, [[ids]] * b)[0][:, 0]

    return (
        occlusion_attribution(score, own["inputs_embeds"][0, places], usual["inputs_embeds"][0, places])
        .cpu()
        .double()
        .numpy()
    )
