"""Pieces of slide_vqa, as its tests take them apart."""

from functools import partial

from attrs import evolve

from medvl.language import chat, system
from medvl.systems.slide_vqa import model as slide_vqa
from medvl.systems.slide_vqa.model import Model


def open_model(cfg, folder, compressor, texts=()):
    """Model and params; `compressor`: (its record, its weights)."""
    language, params = slide_vqa.init_model(cfg, folder, compressor[0], texts)
    return Model(cfg=cfg, language=language, compress=compressor[0], compressor=compressor[1]), params


def encode(model, conversations, prompt=False):
    return slide_vqa.encode_slides(model.cfg, model.language.chat, conversations, prompt=prompt)


def make_batch(model, data, tokens, rows):
    return chat.make_batch(slide_vqa.with_tokens(model, tokens).chat, data, rows)


def batches(model, data, tokens, cfg):
    return chat.training_batches(slide_vqa.with_tokens(model, tokens).chat, data, cfg.train.batch, cfg.seed)


def loss_of(model):
    return system.loss_function(evolve(model.language, train=model.cfg.train))


def cut(model):
    return partial(chat.micro_batch, model.language.chat)
