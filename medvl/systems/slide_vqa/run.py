"""How slide_vqa runs: its data is put in place, the compressor trained and frozen, the stages trained."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import evolve

from medvl.base import config, processes
from medvl.base.tree import Tree
from medvl.components.slots import CompressConfig
from medvl.language import system
from medvl.language.chat import Encoded
from medvl.language.system import LanguageModel
from medvl.phantoms import slide_questions
from medvl.slides import names
from medvl.slides.question_formats import SlideConversation
from medvl.systems.slide_vqa import data
from medvl.systems.slide_vqa.assess import shuffle_slides
from medvl.systems.slide_vqa.model import (
    Model,
    encode_slides,
    init_model,
    open_compressor,
    with_tokens,
    without_slides,
)
from medvl.systems.slide_vqa.pretrain import fit_compressor, labelled, read_fitted
from medvl.systems.slide_vqa.record import Config, data_folder, data_path
from medvl.systems.slide_vqa.tokens import compute_tokens, write_mean_token
from medvl.training import stages
from medvl.training.estimate import Step
from medvl.training.record import Stage

_log = logging.getLogger("medvl")


# Data -------------------------------------------------------------------------------------------------------
def prepare(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: slides are drawn, files must be there, slides that are trained on have features.

    Raises:
        ValueError: what is missing; faults of single questions are warnings.
    """
    if cfg.data.source == "phantoms":
        drawn = slide_questions.draw_slides(cfg.data.phantoms, data_folder(cfg))
        log(f"drawn in {data_folder(cfg)}: " + ", ".join(f"{n} {what}" for what, n in drawn.items()))
    splits = [*_trained_splits(cfg), "valid", "test"]
    missing = [str(data_path(cfg, split)) for split in splits if not data_path(cfg, split).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing: {', '.join(missing)}; data.* says where they are"
        )
    # Slides of one patient are no independent samples, so that splits are compared by patient.
    patients: dict[str, set[str]] = {}
    for split in splits:
        conversations = data.read_split(cfg, split)
        _check_features(cfg, split, conversations, log)
        slides = [slide for conversation in conversations for slide in conversation.names]
        patients[split] = {names.case_of(slide) for slide in slides}
    if cfg.pretrain.labels:
        # The compressor has seen these slides with their labels, whatever the questions ask about.
        rows = labelled(cfg)[0]["train"]
        patients["labels"] = {names.case_of(names.slide_name(row["slide"])) for row in rows}
    for trained in sorted({*patients} - {"valid", "test"}):
        _warn_of_shared_patients(patients, trained)


def _trained_splits(cfg: Config) -> list[str]:
    """The data that the stages are trained on: "captions", "questions"."""
    return sorted({stage.data for stage in cfg.train.stages})


def _check_features(
    cfg: Config, split: str, conversations: Sequence[SlideConversation], log: Callable[[str], None]
) -> None:
    """Raise where slides that are needed have no features; say how many have some."""
    path, slides = data_path(cfg, split), data.slides_of(conversations)
    if not cfg.data.blind and not slides:
        raise ValueError(
            f"{path}: none of {len(conversations)} records names a slide; data.blind = true needs none"
        )
    features = data.open_slides(cfg, slides)
    log(
        f"{split}: {len(conversations)} conversations about {len(features.names)} slides, "
        f"{len(features.missing)} without features"
    )
    # A test may ask about slides without features: those answers count as wrong.
    required = split != "test" or not (features.names or cfg.data.blind)
    if features.missing and required:
        raise ValueError(
            f"{path}: {len(features.missing)} slides have no features below {data_path(cfg, 'features')}, "
            f"the first is {features.missing[0]!r}{features.near}; `invoke slides check` lists all"
        )
    if split == "test" and cfg.evaluate.shuffled and not cfg.data.blind:
        shuffle_slides(conversations, cfg.seed, features.names)  # raises where there are too few slides


def _warn_of_shared_patients(patients: Mapping[str, set[str]], trained: str) -> None:
    """Warn where patients are trained on and scored; cases of TCGA are known by name, others are slides.

    Published sets share some, so that it is not refused, but the numbers should say it.
    """
    for scored in ("valid", "test"):
        shared = patients[trained] & patients[scored]
        if shared:
            _log.warning(
                "%d of %d patients in %s are in %s, too: results on them prove nothing",
                len(shared),
                len(patients[scored]),
                scored,
                trained,
            )


# Training ---------------------------------------------------------------------------------------------------
def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree]:
    """Train the compressor and all stages in the run folder, or go on with them.

    Raises:
        ValueError: what cannot be trained; all that the record, the questions and the language model's
            config show is refused before anything is trained.
    """
    if cfg.train.shard and processes.world_size() == 1:
        _log.warning("train.shard: with one process nothing is sharded; start several with torchrun")
    trained = {split: data.read_split(cfg, split) for split in _trained_splits(cfg)}
    conversations = trained | {
        "valid": data.read_split(cfg, "valid")[: cfg.train.valid or None],
        "test": data.read_split(cfg, "test"),
    }
    every = [conversation for part in conversations.values() for conversation in part]
    in_training = [conversation for part in trained.values() for conversation in part]
    # The language model is made first: it tokenises, and refuses what cannot be trained.
    sizes = _compressor_sizes(cfg, data.slides_of(every))
    texts, device = system.message_texts(in_training), system.device_of(cfg.train)
    language, params = init_model(cfg, folder, sizes, texts, device=device)
    # Bound to this name, so that nothing here holds the whole while it is trained in parts.
    params = stages.shard_params(cfg.train, params)
    encoded = _encode_splits(cfg, language, conversations)
    # Before the compressor is trained: a run that goes on with features of another encoder stops here.
    _keep_encoder(cfg, folder, data.slides_of(every))
    compress, compressor = fit_compressor(cfg, folder, log)
    model = Model(cfg=cfg, language=language, compress=compress, compressor=compressor)
    # Once for all stages and epochs: the compressor is frozen, so that no step reads patches again.
    tokens = compute_tokens(model, folder, every, together=True)
    # The baseline of every map. Test slides have no part in it.
    if tokens and processes.rank() == 0:
        write_mean_token(folder, [tokens[slide] for slide in data.slides_of(in_training)])
    for split in trained:
        count, refused = len(encoded[split].samples), encoded[split].refused
        log(f"{split}: {count} conversations, {refused} more are longer than the context and left out")
    params = system.fit_model(
        with_tokens(model, tokens),
        params,
        lambda stage: encoded[stage.data],
        lambda stage: encoded["valid"] if _is_validated(stage) else None,
        folder,
        log,
    )
    return model, params


def _encode_splits(
    cfg: Config, language: LanguageModel, conversations: Mapping[str, Sequence[SlideConversation]]
) -> dict[str, Encoded]:
    """Token ids of {split: conversations}; the test is only looked at, it is asked when all is trained.

    Raises:
        ValueError: with the file, what cannot be encoded; a stage with fewer conversations than a batch.
    """
    encoded = dict[str, Encoded]()
    for split, part in conversations.items():
        try:
            encoded[split] = encode_slides(cfg, language.chat, part, prompt=split == "test")
        except ValueError as e:
            raise ValueError(f"{data_path(cfg, split)}: {e}") from e
    for stage in cfg.train.stages:
        count = len(encoded[stage.data].samples)
        if count < cfg.train.batch:
            raise ValueError(
                f"{data_path(cfg, stage.data)}: stage {stage.name} needs {cfg.train.batch} "
                f"conversations for a batch, found {count} that fit the context; lower train.batch"
            )
        # Its result is of no use here; it raises where the warm-up is longer than the epochs turn out to be.
        stages.plan_steps(cfg.train, stage, count)
    return encoded


def _compressor_sizes(cfg: Config, slides: Sequence[str]) -> CompressConfig:
    """Those of the compressor that `fit_compressor` will give, by its file or by the features of a slide."""
    sizes = open_compressor(cfg)[0] if cfg.pretrain.file else cfg.compress
    # 0 where a blind run has no slide with features; the width of the record then does.
    dims = data.open_slides(cfg, slides[:1]).dims or sizes.dim
    if cfg.pretrain.file and dims != sizes.dim:
        raise ValueError(
            f"{cfg.pretrain.file}: takes patches of {sizes.dim} numbers, those of {slides[0]} have "
            f"{dims}; another encoder?"
        )
    return evolve(sizes, dim=dims)


def _keep_encoder(cfg: Config, folder: Path, slides: Sequence[str]) -> None:
    """Keep by which encoder the features of all slides and labels were made."""
    if cfg.data.blind and not cfg.pretrain.labels:
        return
    labels: list[str] = []
    if cfg.pretrain.labels:
        labels = [row["slide"] for part in labelled(cfg)[0].values() for row in part]
    data.keep_encoder(folder, data.open_slides(cfg, [*slides, *labels]))


def _is_validated(stage: Stage) -> bool:
    """Questions are validated; of captions, which have no set of their own, the last state counts."""
    return stage.data == "questions"


def load(folder: Path) -> tuple[Model, Tree]:
    """Model and weights of a trained run, as `fit` returned them.

    Raises:
        ValueError: no run, one that is not trained to its end, or whose files are broken.
    """
    cfg = config.load_run(folder, Config)
    # Before the language model, since its width and slots shape the projector.
    compress, compressor = read_fitted(cfg, folder)
    language, params = init_model(cfg, folder, compress, device=system.device_of(cfg.train))
    params = stages.read_stages(cfg.train, params, folder, validated=_is_validated)
    return Model(cfg=cfg, language=language, compress=compress, compressor=compressor), params


# Before a run -----------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training conversation of the last stage as the model gets it, the trained tokens marked."""
    conversations = data.read_split(cfg, cfg.train.stages[-1].data)
    if cfg.data.blind:
        conversations = [without_slides(conversation) for conversation in conversations]
    init = partial(init_model, cfg, folder, _known_sizes(cfg), _known_texts(cfg))
    return system.show_labels(init, conversations, number)


def memory(cfg: Config, folder: Path, processes: int = 1) -> dict[str, Step]:
    """{stage: a step of one of so many processes}.

    One slide a conversation, and all text up to the context trained.
    """
    meta = torch.device("meta")
    # Tensors on "meta" have shapes and no storage; the estimate needs no more.
    language, params = init_model(cfg, folder, _known_sizes(cfg), _known_texts(cfg), device=meta)
    return system.estimate_steps(language, params, [], processes, item="any slide")


def _known_sizes(cfg: Config) -> CompressConfig:
    """Those of the compressor's file, if it is there, else those of the record."""
    # Memory may be asked for before the data is there; the sizes of the record must do then.
    if cfg.pretrain.file and Path(cfg.pretrain.file).exists():
        return open_compressor(cfg)[0]
    return evolve(cfg.compress, dim=cfg.data.dims or cfg.compress.dim)


def _known_texts(cfg: Config) -> list[str]:
    """The texts of what is trained on, as far as it is there: a tokenizer is trained on them."""
    if cfg.model.name or cfg.model.tokenizer:
        return []
    splits = [split for split in {s.data for s in cfg.train.stages} if data_path(cfg, split).exists()]
    return [text for split in splits for text in system.message_texts(data.read_split(cfg, split))]
