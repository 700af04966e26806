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
from medvl.base.transfer import to_device
from medvl.components.text import pool_tokens
from medvl.hub import skeletons


def encode_texts(embedder: Embedder, words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(vectors of texts float32 [b, d], whether a row has one)."""
    cfg = embedder.cfg
    b = len(words)
    with_text = [i for i, text in enumerate(words) if text]
    has_text = torch.zeros(b, dtype=torch.bool)
    has_text[with_text] = True
    if not with_text:
        # Width 1 is enough: it is broadcast against the images, which every row must then have.
        return torch.zeros(b, cfg.dims or 1), has_text
    texts = [cfg.instruction + words[i] for i in with_text]
    rows = _token_ids(embedder, texts)
    # Texts of about one length are encoded together: little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = list[Tensor]()
    for start in track(range(0, len(order), cfg.batch), "embedding texts, batch"):
        numbers = order[start : start + cfg.batch]
        batch = [rows[i] for i in numbers]
        vectors = _encode_token_ids(embedder, batch)
        batches.append(vectors.float().cpu())
    sorted_vectors = _first_dims("embed", cfg, torch.cat(batches))  # [n, d], by length
    # `index_copy` undoes the sorting by length and leaves rows without a text at 0.
    places = torch.tensor(with_text)[order]
    empty = torch.zeros(b, sorted_vectors.shape[1])
    return empty.index_copy(0, places, sorted_vectors), has_text


def _encode_token_ids(embedder: Embedder, rows: list[list[int]]) -> Tensor:
    """Token ids as vectors [n, d]; padded behind, which neither bidirectional nor causal encoders see."""
    cfg = embedder.cfg
    skeleton = embedder.skeleton
    assert skeleton is not None
    device = _device_of(embedder)
    is_siglip = skeleton.config["model_type"] == "siglip"
    length = max(map(len, rows))
    if is_siglip:  # it reads the last place and was trained with padding up to it, which it sees
        length = _max_tokens(embedder)
    ids, mask = _pad_token_ids(rows, length, _padding_id(embedder.tokenizer))
    arguments = {"input_ids": to_device(ids, device)}
    mask = to_device(mask, device)
    if not is_siglip:
        arguments["attention_mask"] = mask.long()
    # The caller's autocast would make the vectors of one embedder differ from each other.
    with torch.autocast(device.type, enabled=False):
        if cfg.kind == "image_text":
            pixels = _blank_image(skeleton, device)  # the forward pass needs texts and images
            output = skeleton(embedder.params, pixel_values=pixels, **arguments)
            return output.text_embeds
        output = skeleton(embedder.params, **arguments)
        return pool_tokens(cfg.pool, output.last_hidden_state, mask)


def _device_of(embedder: Embedder) -> torch.device:
    first = next(iter(embedder.params.values()))
    return first.device


def _padding_id(tok: Any) -> int:
    for token_id in (tok.pad_token_id, tok.eos_token_id):
        if token_id is not None:
            return token_id
    # Any id will do where a tokenizer has none to pad with: the mask hides it.
    return 0


def _pad_token_ids(rows: list[list[int]], length: int, padding_id: int) -> tuple[Tensor, Tensor]:
    """(token ids [n, length], bool [n, length]: true where a token is)."""
    padded = []
    for row in rows:
        padding = [padding_id] * (length - len(row))
        padded.append(row + padding)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(length) < lengths[:, None]
    return torch.tensor(padded), mask


def encode_images(embedder: Embedder, pictures: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
    """(vectors of images float32 [b, d], whether a row has one)."""
    cfg = embedder.cfg
    skeleton = embedder.skeleton
    assert skeleton is not None
    device = _device_of(embedder)
    sources = enumerate_pictures(pictures)
    word = torch.zeros(1, 1, dtype=torch.int64, device=device)  # the forward pass needs texts and images
    batches = list[Tensor]()
    for start in track(range(0, len(sources), cfg.batch), "embedding images, batch"):
        batch = sources[start : start + cfg.batch]
        opened = [open_picture("embed", cfg, *source) for source in batch]
        inputs = embedder.processor(images=opened, return_tensors="pt")
        pixels = to_device(inputs["pixel_values"], device)
        # As for texts: not in the caller's autocast.
        with torch.autocast(device.type, enabled=False):
            output = skeleton(embedder.params, input_ids=word, pixel_values=pixels)
        batches.append(output.image_embeds.float().cpu())
    vectors = _first_dims("embed", cfg, torch.cat(batches))  # [n, d]
    rows = [row for row, _, _ in sources]
    return mean_per_row(vectors, rows, len(pictures))


def _blank_image(skeleton: skeletons.Skeleton, device: torch.device) -> Tensor:
    vision = skeleton.config["vision_config"]
    channels = vision["num_channels"]
    side = vision["image_size"]
    return torch.zeros(1, channels, side, side, device=device)


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
    room = limit - backend.num_special_tokens_to_add(False)
    encoding.truncate(room, direction=tok.truncation_side)
    return backend.post_process(encoding).ids


def _max_tokens(embedder: Embedder) -> int:
    """The longest text, in tokens, that the encoder and its tokenizer are made for."""
    assert embedder.skeleton is not None
    settings = embedder.skeleton.config
    settings = settings.get("text_config", settings)
    positions = settings.get("max_position_embeddings") or 10**9
    # transformers gives 10**30 where a tokenizer has no limit.
    tokens = min(embedder.tokenizer.model_max_length, 10**9)
    limits = [positions, int(tokens)]
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
    prefix = vectors[:, : cfg.dims or None]
    return query_vector(prefix, None)
