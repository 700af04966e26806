"""Texts and images as vectors of an encoder of the hub.

In shapes b are queries, n texts or images of them, d the width of a vector.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medvl.adapters.embed_config import EmbedConfig
from medvl.adapters.embedders import Embedder
from medvl.adapters.queries import enumerate_pictures, mean_per_row, open_picture
from medvl.adapters.retrieve import query_vector
from medvl.base.display import track
from medvl.components.text import pool_tokens
from medvl.hub import skeletons


def encode_texts(embedder: Embedder, words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(vectors of texts float32 [b, d], whether a row has one)."""
    cfg = embedder.cfg
    with_text = [i for i, text in enumerate(words) if text]
    has_text = torch.zeros(len(words), dtype=torch.bool)
    has_text[with_text] = True
    if not with_text:
        # Width 1 is enough: it is broadcast against the images, which every row must then have.
        return torch.zeros(len(words), cfg.dims or 1), has_text
    rows = _token_ids(embedder, [cfg.instruction + words[i] for i in with_text])
    # Texts of about one length are encoded together: little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = list[Tensor]()
    for start in track(range(0, len(order), cfg.batch), "embedding texts, batch"):
        batch = [rows[i] for i in order[start : start + cfg.batch]]
        batches.append(_encode_token_ids(embedder, batch).float().cpu())
    vectors = _first_dims("embed", cfg, torch.cat(batches))
    # `index_copy` undoes the sorting by length and leaves rows without a text at 0.
    places = torch.tensor(with_text)[order]
    return torch.zeros(len(words), vectors.shape[1]).index_copy(0, places, vectors), has_text


def _encode_token_ids(embedder: Embedder, rows: list[list[int]]) -> Tensor:
    """Token ids as vectors [n, d]; padded behind, which neither bidirectional nor causal encoders see."""
    cfg, skeleton, tok = embedder.cfg, embedder.skeleton, embedder.tokenizer
    assert skeleton is not None
    device = next(iter(embedder.params.values())).device
    is_siglip = skeleton.config["model_type"] == "siglip"
    length = max(map(len, rows))
    if is_siglip:  # it reads the last place and was trained with padding up to it, which it sees
        length = _max_tokens(embedder)
    # Any id will do where a tokenizer has none to pad with: the mask hides it.
    pad = next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(length) < lengths[:, None]).to(device)
    arguments = {"input_ids": ids}
    if not is_siglip:
        arguments["attention_mask"] = mask.long()
    # The caller's autocast would make the vectors of one embedder differ from each other.
    with torch.autocast(device.type, enabled=False):
        if cfg.kind == "image_text":
            pixels = _blank_image(skeleton, device)  # the forward pass needs texts and images
            return skeleton(embedder.params, pixel_values=pixels, **arguments).text_embeds
        states = skeleton(embedder.params, **arguments).last_hidden_state
        return pool_tokens(cfg.pool, states, mask)


def encode_images(embedder: Embedder, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
    """(vectors of images float32 [b, d], whether a row has one)."""
    cfg, skeleton = embedder.cfg, embedder.skeleton
    assert skeleton is not None
    device = next(iter(embedder.params.values())).device
    sources = enumerate_pictures(pictures)
    word = torch.zeros(1, 1, dtype=torch.int64, device=device)  # the forward pass needs texts and images
    batches = list[Tensor]()
    for start in track(range(0, len(sources), cfg.batch), "embedding images, batch"):
        opened = [open_picture("embed", cfg, *source) for source in sources[start : start + cfg.batch]]
        pixels = embedder.processor(images=opened, return_tensors="pt")["pixel_values"].to(device)
        with torch.autocast(device.type, enabled=False):
            output = skeleton(embedder.params, input_ids=word, pixel_values=pixels)
        batches.append(output.image_embeds.float().cpu())
    vectors = _first_dims("embed", cfg, torch.cat(batches))
    return mean_per_row(vectors, [row for row, _, _ in sources], len(pictures))


def _blank_image(skeleton: skeletons.Skeleton, device: torch.device) -> Tensor:
    vision = skeleton.config["vision_config"]
    return torch.zeros(1, vision["num_channels"], vision["image_size"], vision["image_size"], device=device)


def _token_ids(embedder: Embedder, texts: list[str]) -> list[list[int]]:
    """Token ids of texts; of one that is too long the tokenizer keeps its end token, if it sets one."""
    tok = embedder.tokenizer
    limit = min(embedder.cfg.context, _max_tokens(embedder))
    # The tokenizer's own warning is silenced; ours below counts the texts.
    rows = tok(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    too_long = [i for i, row in enumerate(rows) if len(row) > limit]
    if too_long:
        warnings.warn(
            f"embed: {len(too_long)} of {len(rows)} texts are longer than {limit} tokens and were cut off",
            stacklevel=5,  # the caller of embed_queries
        )
        for i in too_long:
            rows[i] = _truncate(tok, texts[i], limit)
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(
                f"embed: the tokenizer of {embedder.cfg.name} must give every text a token, it gives "
                f"{text[:60]!r} none"
            )
    return rows


def _truncate(tok: Any, text: str, limit: int) -> list[int]:
    """At most `limit` token ids of a text.

    `truncation=True` would change a setting of the tokenizer, which other threads use meanwhile.
    """
    backend = tok.backend_tokenizer
    encoding = backend.encode(text, add_special_tokens=False)
    # Room is left for the special tokens that post_process adds, so that an end token survives.
    encoding.truncate(limit - backend.num_special_tokens_to_add(False), direction=tok.truncation_side)
    return backend.post_process(encoding).ids


def _max_tokens(embedder: Embedder) -> int:
    """The longest text, in tokens, that the encoder and its tokenizer are made for."""
    assert embedder.skeleton is not None
    settings = embedder.skeleton.config
    settings = settings.get("text_config", settings)
    limits = [
        settings.get("max_position_embeddings") or 10**9,
        # transformers gives 10**30 where a tokenizer has no limit.
        int(min(embedder.tokenizer.model_max_length, 10**9)),
    ]
    for name, module in embedder.skeleton.module.named_modules():
        is_table = name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            # RoBERTa and MPNet count positions from behind the padding id.
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)


def _first_dims(where: str, cfg: EmbedConfig, vectors: Tensor) -> Tensor:
    """The first cfg.dims of each row, of length 1."""
    if cfg.dims > vectors.shape[1]:
        raise ValueError(
            f"{where}: dims must be at most the width {vectors.shape[1]} of the embedding, got {cfg.dims}"
        )
    # A prefix of a Matryoshka embedding (Kusupati et al. 2022, arXiv:2205.13147) is an embedding once it has
    # length 1 again.
    return query_vector(vectors[:, : cfg.dims or None], None)
