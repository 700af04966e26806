"""Tokenizers, of Hugging Face or learnt from texts, and texts as token ids."""

import copy
import functools
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from medvl.base import files
from medvl.base.text import few
from medvl.hub.checkpoints import find_file, new_folder, read_json

# The special tokens of tokenizers that are trained here; the first two are CLIP's.
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def tokenizer(name: files.PathLike) -> Any:
    """A fast Hugging Face tokenizer: a folder, a `tokenizer.json`, or a name on the hub (cache first).

    Code that lies in the folder is never run, and nobody is asked whether it should be.
    Raises:
        ValueError: nothing there, not a tokenizer, or one that needs code of its own; says what was looked
            for.
    """
    from transformers import AutoTokenizer

    path = Path(name)
    if path.is_file():
        # First as plain JSON: the error for a broken file then names it.
        read_json(path)
        with _Reading("tokenizer", path):
            return _without_limits(_wrap(path))
    # vocab.json is GPT-2's kind of tokenizer, vocab.txt BERT's.
    main = find_file(str(name), ("tokenizer.json", "vocab.json", "vocab.txt"))
    # Of a hub name the other files are brought too. AutoTokenizer is then given the snapshot folder, in which
    # it finds all of them without asking the hub.
    if not path.is_dir():
        find_file(str(name), ("tokenizer_config.json",))
        if main.name == "vocab.json":
            find_file(str(name), ("merges.txt",))
    if main.suffix == ".json":
        read_json(main)
    folder = main.parent
    with _Reading("tokenizer", folder):
        # AutoTokenizer needs a config to choose a class; a tokenizer.json alone is complete without one.
        if main.name == "tokenizer.json" and not (folder / "tokenizer_config.json").is_file():
            return _without_limits(_wrap(main))
        # Without an explicit False, transformers asks on standard input whether to run the code that
        # `auto_map` names.
        tok = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _without_limits(tok)


def _without_limits(tok: Any) -> Any:
    """The tokenizer without its file's truncation and padding.

    A first call would take them off while other threads use the tokenizer.
    """
    backend = getattr(tok, "backend_tokenizer", None)  # tokenizers in Python have none
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tok


class _Reading:
    """Turns whatever transformers and tokenizers raise while they read `path` into one ValueError."""

    def __init__(self, reader: str, path: Path) -> None:
        self.reader, self.path = reader, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # tokenizers raises `Exception` itself, no subclass, for a tokenizer.json that it cannot use
        unreadable = (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            ImportError,
            RecursionError,
        )
        # Nothing was raised, or what is no fault of the file, such as KeyboardInterrupt: leave it as it is.
        if kind is None or not (kind is Exception or issubclass(kind, unreadable)):
            return
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{self.reader}: {self.path} needs code of its own (auto_map in its config), which is "
                "never run; convert it with "
                "save_pretrained of a tokenizer class that transformers has, or give its tokenizer.json alone"
            ) from error
        reason = " ".join(str(error).split())  # on one line
        raise ValueError(
            f"{self.reader}: {self.path} does not hold one that transformers reads ({reason})"
        ) from error


def image_processor(name: files.PathLike) -> Any:
    """The image processor of a checkpoint, on Pillow: `processor(images=[...],
    return_tensors="pt")["pixel_values"]`.

    Args:
        name: a folder or a name on the hub (cache first) with preprocessor_config.json, or
            processor_config.json.
    Raises:
        ValueError: nothing there, or no image processor that transformers has on Pillow; says what was
            looked for.
    """
    import transformers

    main = find_file(str(name), ("preprocessor_config.json", "processor_config.json"))
    config = read_json(main)
    # processor_config.json holds the settings one level down, beside those of the tokenizer.
    config = config.get("image_processor", config)
    if not isinstance(config, dict):
        raise ValueError(
            f"image_processor: {main}: image_processor must be an object, found {type(config).__name__}"
        )
    # Files name the class under two keys and in three forms (CLIPImageProcessor, CLIPImageProcessorFast,
    # CLIPFeatureExtractor). The class on Pillow is taken by its name: AutoImageProcessor would ask for
    # torchvision.
    class_name = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    base = class_name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    kind = None
    if base.endswith("ImageProcessor"):
        kind = getattr(transformers, f"{base}Pil", None)
    if kind is None:
        raise ValueError(
            f"image_processor: {main} must name one that transformers has on Pillow "
            f"(CLIPImageProcessor...), found {class_name!r}"
        )
    with _Reading("image_processor", main):
        return kind.from_dict(config)


@frozen(kw_only=True)
class CodeTokens:
    """The ids of image codes: code k of `number` is the token `first` + k, between `start` and `end`."""

    start: int
    first: int
    number: int
    end: int
    newline: int  # HealthGPT's tables have a row for it, its code never writes it


def add_image_codes(tok: Any, number: int = 8192) -> CodeTokens:
    """Give a tokenizer the tokens of image codes: <start_index>, <idx_0> and so on, <end_index>, <pixel_newline>.

    They are added to `tok` itself, behind all that it has; where it has them already nothing changes.

    Raises:
        ValueError: it has some of them, or has them elsewhere or in another order.
    Source: Lin et al. 2025 (HealthGPT), arXiv:2502.09838, and its public code, `llava/demo/utils.py`,
        `add_special_tokens_and_resize_model`.
    """
    codes = [f"<idx_{i}>" for i in range(number)]
    names = ["<start_index>", *codes, "<end_index>", "<pixel_newline>"]
    known = tok.get_vocab()
    if not known.keys() & {*names}:
        tok.add_tokens(names, special_tokens=True)
    ids = tok.convert_tokens_to_ids(names)
    first = len(tok) - len(names)
    if ids != [*range(first, len(tok))]:
        raise ValueError(
            f"add_image_codes: the last {len(names)} tokens of the tokenizer must be <start_index>, <idx_0> to "
            f"<idx_{number - 1}>, <end_index> and <pixel_newline>, but <start_index> is {ids[0]} and "
            f"<pixel_newline> {ids[-1]} of {len(tok)}; take the base model's tokenizer"
        )
    return CodeTokens(start=ids[0], first=ids[1], number=number, end=ids[-2], newline=ids[-1])


def spaced_once(tok: Any) -> Any:
    """A tokenizer that puts sentencepiece's space before a text, and not behind each special token in it, too.

    tokenizer.json of Phi-3 and Llama 2 does the latter, transformers' slow tokenizers with legacy = false the
    former. Any other tokenizer is returned itself.
    """
    # Its size too: a tokenizer may get new tokens between two calls.
    return _spaced_once(tok, len(tok))


@functools.lru_cache(maxsize=8)
def _spaced_once(tok: Any, size: int) -> Any:
    from tokenizers import pre_tokenizers

    normalizer = tok.backend_tokenizer.normalizer
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    # What it is made of, only its state says.
    state = None if normalizer is None else json.loads(normalizer.__getstate__())
    if state != {"type": "Sequence", "normalizers": [prepend, replace]}:
        return tok
    copied = copy.deepcopy(tok)
    copied.backend_tokenizer.normalizer = None
    copied.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return copied


def train_bpe(
    texts: Sequence[str], vocab_size: int, folder: files.PathLike | None = None, *, lower: bool = True
) -> Any:
    """A byte-level BPE tokenizer learnt from texts: lower case and single spaces as CLIP's, start and end
    token around every text.

    With lower=False case is kept, as letters of multiple choice need.

    Deterministic. Every text can be encoded, there is no unknown token. Written to `folder` (must be new) if
    one is given.
    Source: Sennrich et al. 2016, arXiv:1508.07909; bytes as in Radford et al. 2019 (GPT-2).
    Raises:
        ValueError: vocab_size cannot hold the 256 bytes and the 3 special tokens, or there is no text.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    if vocab_size < 259 or not texts:
        raise ValueError(
            "train_bpe: needs texts and vocab_size >= 259 (256 bytes, 3 special tokens), got "
            f"{len(texts)} texts, {vocab_size}"
        )
    tok: Any = Tokenizer(models.BPE())
    # One form of each accented letter, single spaces, none at the ends.
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if lower:
        steps.append(normalizers.Lowercase())
    tok.normalizer = normalizers.Sequence(steps)
    # The first word gets a space too, so that it has the same tokens as within a text.
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.decoder = decoders.ByteLevel()
    # All 256 bytes are tokens from the start, so every text can be encoded. Sorted: they come in no fixed
    # order.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END, PAD],
        initial_alphabet=sorted(alphabet),
        min_frequency=2,  # pairs that occur once are not merged
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    ids = [(t, tok.token_to_id(t)) for t in (START, END)]
    tok.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    # transformers' class around it is read from a file, as that of any other tokenizer.
    with tempfile.TemporaryDirectory() as tmp:
        tok.save(f"{tmp}/tokenizer.json")
        fast = _wrap(Path(tmp) / "tokenizer.json", bos_token=START, eos_token=END, pad_token=PAD)
    if folder is not None:
        with new_folder(folder) as new:
            fast.save_pretrained(new)
    return fast


def tokenize(tok: Any, texts: Sequence[str], context: int) -> tuple[Tensor, Tensor]:
    """Token ids of texts, padded to the longest of them.

    Args:
        tok: from `tokenizer` or `train_bpe`.
        context: longest sequence; a longer text loses its tail and keeps its end token. The first time one
            does, a warning says so; `truncated` counts them.
    Returns:
        ids int64 [b, t] and mask bool [b, t], true at real tokens (CLIP pads with its end token, so ids do
        not tell).
    Raises:
        ValueError: no texts, not texts, or a tokenizer that puts no end token behind a text.
    """
    rows = _encode(tok, texts, context)
    longest = max(map(len, rows))
    if longest > context:
        warnings.warn(
            f"tokenize: texts longer than {context} tokens lose their tail (count them with "
            "tokens.truncated)",
            stacklevel=2,
        )
        # The end token must stay: CLIP's text encoder reads the embedding at its place.
        longest = context
        rows = [row if len(row) <= context else [*row[: context - 1], row[-1]] for row in rows]

    # Padding is masked, so which token fills it does not matter; 0 where a tokenizer has neither.
    pad = tok.pad_token_id
    if pad is None:
        pad = tok.eos_token_id or 0
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < lengths[:, None]
    return ids, mask


def truncated(tok: Any, texts: Sequence[str], context: int) -> int:
    """How many of the texts are longer than `context` tokens."""
    return sum(len(r) > context for r in _encode(tok, texts, context))


def _encode(tok: Any, texts: Sequence[str], context: int) -> list[list[int]]:
    """Token ids of each text, of its full length, with start and end token."""
    # A string is a sequence of strings too: its letters would become a batch. With a context below 3 nothing
    # would be left between start and end token.
    bad = [type(t).__name__ for t in texts if not isinstance(t, str)]
    if isinstance(texts, str) or not len(texts) or bad or context < 3:
        raise ValueError(
            f"tokenize: needs a list of texts and context >= 3, got {len(texts)} texts, context "
            f"{context}, other types {few(bad)}"
        )
    # `tokenize` cuts before the last token and keeps it: that must be an end token.
    empty = tok("", truncation=False)["input_ids"]
    if not empty or empty[-1] not in tok.all_special_ids:
        raise ValueError(
            "tokenize: the tokenizer must put an end token behind every text, but an empty text "
            f"gives {empty}"
        )
    # Not verbose: it would warn of texts longer than the model's limit, which are cut by the caller.
    return tok(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]


def _wrap(path: Path, **special: str) -> Any:
    """transformers' class around a tokenizer.json.

    Args:
        special: its special tokens, such as eos_token; without any, the end token is found.
    """
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    if not special:
        # A bare file does not say which of its tokens ends a text: the template puts it behind an empty one.
        ends = fast("")["input_ids"]
        if ends:
            fast.eos_token = fast.convert_ids_to_tokens(ends[-1])
    return fast
