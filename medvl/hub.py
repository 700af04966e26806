"""Hugging Face encoders as skeletons whose weights are values; checkpoints and tokenizers. Only this file imports transformers."""

import copy
import hashlib
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Generator, Tensor, nn

from medvl import files, tree
from medvl.checkpoints import few, find, new_folder, read_json, read_pickle, read_weights
from medvl.dinov2 import config_of
from medvl.dinov2 import from_dinov2 as from_dinov2
from medvl.dinov2 import to_dinov2 as to_dinov2

Params = dict[str, Tensor]  # flat: {module name: tensor}

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Keys a checkpoint may have that the plain encoder does not: heads of a task, poolers, the temperature of a contrastive pair.
_HEADS = re.compile(r"(^|\.)(pooler|classifier|head|lm_head|cls|qa_outputs|score|visual_projection|text_projection|logit_scale)(\.|$)")
_UNUSED = re.compile(r"(^|\.)mask_token$")  # only masked pre-training reads it
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@frozen(kw_only=True, eq=False)
class Skeleton:
    """An architecture without weights: `skeleton(params, *args, **kwargs)` is the module's forward pass with these weights.

    `module` has its parameters on the meta device and real buffers, in evaluation mode (no dropout, no stochastic depth). A call binds
    `params` to the module while it runs, so one skeleton serves one thread: give each its own `copy.deepcopy(skeleton)`, which holds no
    weights. `params` must have exactly the names of the module's parameters (ValueError).
    """

    module: nn.Module = field(repr=False)
    name: str
    config: dict[str, Any] = field(repr=False)
    _names: frozenset[str] = field(init=False, repr=False)
    _buffers: tuple[str, ...] = field(init=False, repr=False)
    _layers: tuple[nn.Module, ...] = field(init=False, repr=False)
    _tied: bool = field(init=False, repr=False)

    @_names.default
    def _its_names(self) -> frozenset[str]:
        return frozenset(n for n, _ in self.module.named_parameters())

    @_buffers.default
    def _its_buffers(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.module.named_buffers())

    @_layers.default
    def _its_layers(self) -> tuple[nn.Module, ...]:
        return tuple(m for m in self.module.modules() if hasattr(m, "gradient_checkpointing"))

    @_tied.default
    def _if_tied(self) -> bool:
        return len(list(self.module.named_parameters(remove_duplicate=False))) > len(self._names)

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if params.keys() != self._names:
            missing, extra = sorted(self._names - params.keys()), sorted(params.keys() - self._names)
            raise ValueError(
                f"{self.name}: params must be exactly its {len(self._names)} weights; missing {few(missing)}, unknown {few(extra)}"
            )
        if any(m.gradient_checkpointing for m in self._layers):
            raise ValueError(
                f"{self.name}: gradient checkpointing inside the module would recompute with other weights; "
                "turn it off and put torch.utils.checkpoint around the call (EncodeConfig.checkpoint)"
            )
        device = next(iter(params.values())).device
        buffers = {n: self.module.get_buffer(n).to(device) for n in self._buffers}
        return torch.func.functional_call(self.module, {**buffers, **params}, args, kwargs, tie_weights=self._tied)


def load(
    name: files.PathLike,
    *,
    part: Literal["", "text", "vision"] = "",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Skeleton, Params]:
    """An encoder and its weights.

    Args:
        name: a folder with config.json and model.safetensors (or shards with their index, or pytorch_model.bin); a name on the Hugging Face
            hub, read from its cache and downloaded only if it is not there; or an original DINOv2 file (`dinov2_vitb14_pretrain.pth`).
        part: of a checkpoint that holds two towers (CLIP), the one to take.
    Returns:
        skeleton and params {module name: tensor}, detached, of `dtype` on `device`. Pickled files are read with weights_only=True.
        Left out are task heads and poolers; a `mask_token` that is missing is zeros (only pre-training reads it).
    Raises:
        ValueError: nothing there (says what was looked for, and where), a broken file, keys missing, unexpected or of another shape.
    """
    path = Path(name)
    if path.is_file():
        state = read_pickle(path)
        config = config_of(state, str(path))
        return bind(config, from_dinov2(state), name=path.stem, dtype=dtype, device=device)
    config = read_json(find(str(name), ("config.json",)))
    state = read_weights(find(str(name), _WEIGHTS), str(name))
    if part:
        if f"{part}_config" not in config:
            raise ValueError(f"load: {name} has no {part} tower (its config.json has no {part}_config); leave part empty")
        config = {"model_type": f"{config['model_type']}_{part}_model"} | config[f"{part}_config"]
        state = {k: t for k, t in state.items() if k.startswith(f"{part}_model.")}
    return bind(config, state, name=str(name), dtype=dtype, device=device)


def bind(
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    *,
    name: str = "",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Skeleton, Params]:
    """Skeleton and params of a config dict and a state dict with the names of published checkpoints; transformers maps the names.

    Raises:
        ValueError: as `load`.
    """
    kind, cfg = _architecture(config)
    name = name or str(config["model_type"])
    wrong = [f"{k} ({str(t.dtype)[6:]})" for k, t in state.items() if t.dtype not in _FLOATS and not k.endswith("position_ids")]
    if wrong:
        raise ValueError(
            f"load: {name}: weights must be float16, bfloat16, float32 or float64, found {few(wrong)}; quantised files are not read"
        )
    options: dict[str, Any] = {"dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with _quiet():
        try:
            module, info = kind.from_pretrained(None, config=cfg, state_dict=dict(state), **options, **_plain(kind))
        except RuntimeError as e:
            raise ValueError(f"load: {name}: its weights do not fit a {kind.__name__}: {e}") from e
    missing = sorted(k for k in info["missing_keys"] if not _UNUSED.search(k))
    extra = sorted(k for k in info["unexpected_keys"] if not _HEADS.search(k) and not _UNUSED.search(k))
    shapes = sorted(f"{k} {list(found)} instead of {list(needed)}" for k, found, needed in info["mismatched_keys"])
    if missing or extra or shapes or info["error_msgs"]:
        parts = (("missing", missing), ("unexpected", extra), ("of another shape", shapes), ("broken", info["error_msgs"]))
        raise ValueError(f"load: {name} is no {kind.__name__} of this config: " + "; ".join(f"{w} {few(ks)}" for w, ks in parts if ks))
    return _split(module, name, device)


def init_skeleton(config: dict[str, Any], gen: Generator) -> tuple[Skeleton, Params]:
    """An architecture with transformers' own random initialisation, float32 on CPU, a pure function of `gen`.

    Args:
        config: such as {"model_type": "dinov2", "hidden_size": 96, ...}; what is left out has transformers' default.
    Raises:
        ValueError: unknown model_type or key, or a value of the wrong type.
    """
    kind, cfg = _architecture(config)
    known = {*type(cfg)().to_dict(), *cfg.attribute_map, "model_type"}
    if unknown := sorted(config.keys() - known):
        has = ", ".join(sorted(k for k in known if not k.startswith("_")))
        raise ValueError(f"init_skeleton: a {config['model_type']} config has no {', '.join(unknown)}; it has {has}")
    seed = int(torch.randint(2**62, (), generator=gen))
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        module = kind._from_config(cfg, dtype=torch.float32, **_plain(kind)).eval()
    return _split(module, str(config["model_type"]), "cpu")


def save(skeleton: Skeleton, params: Mapping[str, Tensor], folder: files.PathLike) -> None:
    """Write config.json and model.safetensors, with the names of published checkpoints, that transformers' from_pretrained reads.

    The folder is there whole or not at all.
    Raises:
        ValueError: the folder exists and is not empty, or params are not the skeleton's.
    """
    if params.keys() != skeleton._names:
        raise ValueError(
            f"save: params must be the {len(skeleton._names)} weights of {skeleton.name}, got {len(params)}: {few(sorted(params))}"
        )
    module: Any = copy.deepcopy(skeleton.module)
    module.load_state_dict({n: t.detach() for n, t in params.items()}, strict=False, assign=True)
    module.tie_weights()
    with new_folder(folder) as tmp, _quiet():
        module.save_pretrained(tmp)


def digest(params: tree.Tree) -> str:
    """Sixteen hex digits of the content of a tree of tensors: names, dtypes, shapes and bytes. Independent of order and device."""
    whole = hashlib.sha256()
    for name, t in sorted(tree.flatten(params).items()):
        whole.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        whole.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


# Tokenizers -----------------------------------------------------------------------------------------------------------------------------
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def tokenizer(name: files.PathLike) -> Any:
    """A fast Hugging Face tokenizer: a folder, a `tokenizer.json`, or a name on the hub (cache first).

    Raises:
        ValueError: nothing there, or not a tokenizer; says what was looked for.
    """
    from transformers import AutoTokenizer

    if (path := Path(name)).is_file():
        read_json(path)
        return _wrap(path)
    main = find(str(name), ("tokenizer.json", "vocab.json", "vocab.txt"))
    if not path.is_dir():  # a hub name: AutoTokenizer finds all files in the snapshot folder
        find(str(name), ("tokenizer_config.json",))
        if main.name == "vocab.json":
            find(str(name), ("merges.txt",))
    if main.suffix == ".json":
        read_json(main)
    if main.name == "tokenizer.json" and not (main.parent / "tokenizer_config.json").is_file():
        return _wrap(main)
    try:
        return AutoTokenizer.from_pretrained(main.parent, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"tokenizer: {main.parent} does not hold a tokenizer that transformers reads ({e})") from e


def train_bpe(texts: Sequence[str], vocab_size: int, folder: files.PathLike | None = None) -> Any:
    """A byte-level BPE tokenizer learnt from texts: lower case and single spaces as CLIP's, start and end token around every text.

    Deterministic. Every text can be encoded, there is no unknown token. Written to `folder` (must be new) if one is given.
    Source: Sennrich et al. 2016, arXiv:1508.07909; bytes as in Radford et al. 2019 (GPT-2).
    Raises:
        ValueError: vocab_size cannot hold the 256 bytes and the 3 special tokens, or there is no text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocab_size < 259 or not texts:
        raise ValueError(
            f"train_bpe: needs texts and vocab_size >= 259 (256 bytes, 3 special tokens), got {len(texts)} texts, {vocab_size}"
        )
    tok: Any = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[START, END, PAD], initial_alphabet=sorted(alphabet), min_frequency=2, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    ids = [(t, tok.token_to_id(t)) for t in (START, END)]
    tok.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
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
        context: longest sequence; a longer text loses its tail and keeps its end token. The first time one does, a warning says so;
            `truncated` counts them.
    Returns:
        ids int64 [b, t] and mask bool [b, t], true at real tokens (CLIP pads with its end token, so ids do not tell).
    Raises:
        ValueError: no texts, not texts, or a tokenizer that puts no end token behind a text.
    """
    rows = _encode(tok, texts, context)
    if any(len(r) > context for r in rows):
        warnings.warn(f"tokenize: texts longer than {context} tokens lose their tail (count them with hub.truncated)", stacklevel=2)
    rows = [r if len(r) <= context else [*r[: context - 1], r[-1]] for r in rows]
    longest = max(map(len, rows))
    pad = tok.eos_token_id if tok.pad_token_id is None else tok.pad_token_id
    ids = torch.tensor([r + [pad or 0] * (longest - len(r)) for r in rows])
    return ids, torch.arange(longest) < torch.tensor([len(r) for r in rows])[:, None]


def truncated(tok: Any, texts: Sequence[str], context: int) -> int:
    """How many of the texts are longer than `context` tokens."""
    return sum(len(r) > context for r in _encode(tok, texts, context))


def _encode(tok: Any, texts: Sequence[str], context: int) -> list[list[int]]:
    bad = [type(t).__name__ for t in texts if not isinstance(t, str)]
    if isinstance(texts, str) or not len(texts) or bad or context < 3:
        raise ValueError(
            f"tokenize: needs a list of texts and context >= 3, got {len(texts)} texts, context {context}, other types {few(bad)}"
        )
    empty = tok("", truncation=False)["input_ids"]
    if not empty or empty[-1] not in tok.all_special_ids:
        raise ValueError(f"tokenize: the tokenizer must put an end token behind every text, but an empty text gives {empty}")
    return tok(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]


def _wrap(path: Path, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    if not special:  # a bare file does not say which of its tokens end or pad a text: take them from its own template
        ends = fast("")["input_ids"]
        if ends:
            fast.eos_token = fast.convert_ids_to_tokens(ends[-1])
    return fast


# Architectures --------------------------------------------------------------------------------------------------------------------------
def _architecture(config: dict[str, Any]) -> tuple[Any, Any]:
    """(transformers class, its config) of the plain encoder a config dict describes; never code from the checkpoint."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        own = "; it needs code of its own, which is never run" if "auto_map" in config else ""
        raise ValueError(
            f"config: model_type must be an encoder that transformers has (dinov2, dinov3_vit, vit, bert...), found {kind!r}{own}"
        )
    try:
        cfg = CONFIG_MAPPING[kind].from_dict(config)
    except (StrictDataclassError, TypeError, ValueError) as e:
        raise ValueError(f"config: not a {kind}: {' '.join(str(e).split())}") from e
    return MODEL_MAPPING[type(cfg)], cfg


def _plain(kind: Any) -> dict[str, bool]:
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}


def _split(module: Any, name: str, device: str | torch.device) -> tuple[Skeleton, Params]:
    """Take the weights out of a module: what is left is on meta, tied weights stay tied."""
    params: Params = {}
    metas: dict[int, nn.Parameter] = {}
    where = {id(p): n for n, p in module.named_parameters()}
    for part in module.modules():
        for key, p in list(part._parameters.items()):
            if p is None:
                continue
            if id(p) not in metas:
                metas[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
                params[where[id(p)]] = p.detach().to(device, copy=True)
            part._parameters[key] = metas[id(p)]
        for key, b in part._buffers.items():
            part._buffers[key] = b if b is None else b.to(device)
    return Skeleton(module=module, name=name, config=json.loads(json.dumps(module.config.to_dict(), default=str))), params


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers: what matters of them is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
