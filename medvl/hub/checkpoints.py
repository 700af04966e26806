"""The files of checkpoints.

They are looked for in a folder, in the hub's cache and on the hub, read without running anything in them,
and written whole.
"""

import ctypes
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medvl.base import files
from medvl.base.text import few

_log = logging.getLogger(__name__)

# By their names in the headers of safetensors files.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What the hub accepts as a name; "./folder" and "../folder" are none.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def find_file(name: str, choices: tuple[str, ...]) -> Path:
    """The first of `choices` that is in the folder `name`, in the hub cache, or on the hub.

    Never waits for a network that is not there.

    Raises:
        ValueError: none is there; says where it was looked for, and how to bring it.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    folder, expected = Path(name), " or ".join(choices)
    if folder.is_dir():
        for choice in choices:
            if (folder / choice).is_file():
                return folder / choice
        names = sorted(p.name for p in folder.iterdir())
        raise ValueError(f"hub: the folder {folder} must hold {expected}, found {few(names)}")
    if not _HUB_NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise ValueError(f"hub: there is no file or folder {name}")

    # The cache first, then one short request: without it the hub's client would retry for half a minute on a
    # machine without a network.
    for choice in choices:
        cached = try_to_load_from_cache(name, choice)
        if isinstance(cached, str):
            return Path(cached)
    missing = f"hub: {name} is not a folder here, and the cache {constants.HF_HUB_CACHE} lacks {expected}"
    advice = (
        f"on a connected machine run `hf download {name} --local-dir DIR`, "
        "bring DIR here and give its path as the name"
    )
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{missing}; HF_HUB_OFFLINE is set, so nothing is downloaded: {advice}")
    reason = _unreachable(constants.ENDPOINT)
    if reason:
        raise ValueError(f"{missing}; {constants.ENDPOINT} cannot be reached ({reason}): {advice}")
    return _download(name, choices, missing)


def find_optional_file(name: str, choice: str) -> Path | None:
    """The file `choice` beside the others of a checkpoint, None where the checkpoint has none.

    If the cache of a hub name does not say whether there is such a file, the hub is asked; a warning says
    where that fails.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        path = Path(name) / choice
        return path if path.is_file() else None
    cached = try_to_load_from_cache(name, choice)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # the cache knows that the hub has none
        return None
    try:
        return find_file(name, (choice,))
    except ValueError as e:
        # That the hub has no such file is an answer. Any other reason leaves it open, and says so.
        if "the hub has none" not in str(e):
            _log.warning(
                "%s: it may have a %s that is not in the cache, and is read without it (%s)", name, choice, e
            )
        return None


def _download(name: str, choices: tuple[str, ...], missing: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

    for choice in choices:
        try:
            return Path(hf_hub_download(name, choice))
        except RemoteEntryNotFoundError:  # the model is there, this file is not: try the next name
            continue
        except (HfHubHTTPError, OSError) as e:
            raise ValueError(
                f"{missing}; the download failed ({e}). Check the name; a gated model needs `hf auth login`"
            ) from e
    raise ValueError(f"{missing}; the hub has none either")


def _unreachable(url: str) -> str:
    """Why one short request fails, "" if any answer comes; the hub's own client would retry for half a
    minute.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=1.5).close()
    except urllib.error.HTTPError:  # also an error is an answer
        return ""
    except OSError as e:  # URLError and timeouts
        return str(getattr(e, "reason", e))
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: no file, not JSON, or another value than an object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark first
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"load: {path} is not JSON ({e})") from e
    if not isinstance(raw, dict):
        raise ValueError(f"load: {path} must hold a JSON object, found {type(raw).__name__}")
    return raw


@frozen(kw_only=True)
class Entry:
    """A tensor of a checkpoint that has not been read yet."""

    shape: tuple[int, ...]  # () where only reading tells
    dtype: torch.dtype
    read: Callable[[], Tensor]  # a new tensor each time


ANY = -1  # in a shape that `list_faults` is given: of whatever size
Shape = tuple[int, ...]


def list_faults(
    shapes: Mapping[str, Shape], needed: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None
) -> str:
    """What is wrong with the tensors of a file, as one text that names all faults; "" where they fit.

    Args:
        shapes: {name: shape} in the file; () where only reading tells.
        needed: {name: shape} that must be there.
        optional: {name: shape} that may be there.
    """
    known = {**needed, **(optional or {})}
    misshaped = []
    for name, shape in shapes.items():
        expected = known.get(name, ())
        if shape and expected and not _fits(shape, expected):
            sizes = ["any" if size == ANY else size for size in expected]
            misshaped.append(f"{name} {list(shape)} instead of {sizes}")
    named = {
        "missing": [name for name in needed if name not in shapes],
        "unexpected": [name for name in shapes if name not in known],
        "of another shape": misshaped,
    }
    return "; ".join(f"{fault} {few(names)}" for fault, names in named.items() if names)


def _fits(shape: Shape, expected: Shape) -> bool:
    return len(shape) == len(expected) and all(e in (n, ANY) for n, e in zip(shape, expected, strict=True))


def shapes_of(entries: Mapping[str, Entry]) -> dict[str, Shape]:
    """{name: shape} of entries."""
    return {name: entry.shape for name, entry in entries.items()}


def entries_of(state: Mapping[str, Tensor]) -> dict[str, Entry]:
    """A state dict in memory as entries."""
    entries = {}
    for key, tensor in state.items():
        entries[key] = Entry(shape=tuple(tensor.shape), dtype=tensor.dtype, read=partial(_copy, tensor))
    return entries


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone()


def open_weights(path: Path, name: str) -> dict[str, Entry]:
    """The tensors of a weight file or of all shards an index names; only shapes and dtypes are read."""
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix != ".json":
        return entries_of(read_pickle(path))
    entries: dict[str, Entry] = {}
    for shard in _shards(path):
        # A shard in the hub's cache may not lie there yet.
        file = path.parent / shard if Path(name).is_dir() else find_file(name, (shard,))
        entries |= _open_safetensors(file)
    return entries


def _shards(index: Path) -> list[str]:
    """The files that an index names. Names of other folders are refused: the index comes from outside."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"load: {index} names no shards: weight_map must be {{weight: file}}, "
            f"found {json.dumps(weight_map)[:60]}"
        )
    for weight, shard in weight_map.items():
        # "../x.safetensors" and "/x.safetensors" have another name than their last part.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"load: {index}: weight_map must name .safetensors files in the folder of the index, "
                f"found {json.dumps(shard)[:100]} for {weight}"
            )
    return sorted(set(weight_map.values()))


def _open_safetensors(path: Path) -> dict[str, Entry]:
    """The entries of a safetensors file.

    Each tensor is read into memory of its own: mapped pages would count as much again as long as the file is
    open.
    """
    try:
        with safe_open(path, framework="pt") as f:  # checks the whole header
            shapes = {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118 (not a dict)
        # safetensors does not tell where a tensor lies in the file. Its header does: 8 bytes with the length
        # of the header, then JSON.
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except FileNotFoundError as e:
        raise ValueError(f"load: {path} is missing, but its index names it; download the folder again") from e
    except (SafetensorError, OSError) as e:
        raise ValueError(f"load: {path} is broken or cut off ({e}); download it again") from e
    entries = {}
    for key, shape in shapes.items():
        dtype_name = header[key]["dtype"]
        if dtype_name not in _DTYPES:
            raise ValueError(f"load: {path}: {key} has values of {dtype_name}, which are not read")
        dtype = _DTYPES[dtype_name]
        start, stop = header[key]["data_offsets"]  # counted from the end of the header
        read = partial(_read_bytes, path, 8 + length + start, stop - start, dtype, shape)
        entries[key] = Entry(shape=shape, dtype=dtype, read=read)
    return entries


def _read_bytes(path: Path, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor from `size` bytes of a file, read straight into its memory."""
    buffer = torch.empty(size, dtype=torch.uint8)
    view = memoryview(buffer.numpy().data)
    filled = 0
    with open(path, "rb", buffering=0) as f:
        f.seek(start)
        while filled < size:  # one call reads at most 2 GB
            n = f.readinto(view[filled:])
            if not n:
                raise ValueError(f"{path} was cut off while it was read")
            filled += n
    return buffer.view(dtype).view(shape)


def release_memory() -> None:
    """Return freed memory to the system, where the C library can; glibc keeps what lies below a small tensor
    in use.
    """
    if os.name != "posix":
        return
    # Only glibc has it; musl and macOS do not.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Foreign(dict):
    """Stands for a class that is not torch's: made of anything, without content, and doing nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: Path, part: str = "") -> dict[str, Tensor]:
    """A flat dict of tensors that torch.save wrote; nothing in the file is run.

    Args:
        part: the key of that dict, where the file has others beside it, as a checkpoint of PyTorch Lightning.
            Objects of other classes that lie there are read as empty ones, and their code is never imported.
    """
    # A compressed file could unpack to any size.
    files.check_uncompressed(path)
    try:
        # Mapped: its tensors are read when they are used. The format before torch 1.6 is no zip file and
        # cannot be mapped.
        zipped = zipfile.is_zipfile(path)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if part and zipped else []
        with torch.serialization.safe_globals([(_Foreign, name) for name in foreign]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, ValueError, *files.READ_ERRORS) as e:
        advice = ""
        if part:
            advice = f'; where it was made, write its weights alone: torch.save({{"{part}": checkpoint["{part}"]}}, FILE)'
        raise ValueError(
            f"load: {path} is not a file of plain tensors, or broken ({files.error_reason(e)}){advice}"
        ) from e
    if part and isinstance(state, dict):
        state = state.get(part)
    flat = isinstance(state, dict)
    flat = flat and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items())
    if not flat:
        where = f" under {part!r}" if part else ""
        raise ValueError(f"load: {path} must hold one flat dict of tensors{where}")
    # A small file can claim a large tensor, with strides of 0 over one value.
    files.check_tensor_storage(path, state)
    return state


def read_finite(
    entry: Entry, key: str, path: Path, dtype: torch.dtype | None, device: str | torch.device
) -> Tensor:
    """A tensor of an adapter in `dtype` (None: the file's) on `device`; it must hold floating point numbers, all
    of them finite.
    """
    if not entry.dtype.is_floating_point:
        raise ValueError(f"read: {path}: {key} must hold floating point numbers")
    dtype = dtype or entry.dtype
    t = entry.read().to(device, dtype)
    # After the cast: a number of float32 may be infinite in float16.
    if not _finite(t):
        raise ValueError(f"read: {path}: {key} must be finite in {str(dtype)[6:]}, but holds NaN or infinity")
    return t


def _finite(t: Tensor) -> bool:
    """One pass without a mask: ten times faster than isfinite."""
    return not t.numel() or bool(torch.stack(t.aminmax()).isfinite().all())


def save_finite(state: Mapping[str, Tensor], path: Path, context: str, pickled: bool = False) -> None:
    """Write tensors that must be finite, each with a memory of its own, as safetensors or `pickled`."""
    wrong = [n for n, t in state.items() if not _finite(t)]
    if wrong:
        raise ValueError(f"{context}: {few(wrong)} must be finite")
    # Copies: safetensors refuses tensors that share memory, torch.save would write all of a view's storage.
    copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items()}
    if pickled:
        with open(path, "wb") as file:  # to a path torch does not say that the disk is full
            torch.save(copies, file)
    else:
        save_file(copies, path, {"format": "pt"})


@contextmanager
def new_folder(folder: files.PathLike) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well and vanishes when
    not.
    """
    folder = Path(folder)
    check_new_folder(folder)
    with files.file_lock(folder), files.room_for(folder):
        check_new_folder(folder)  # another process may have written it meanwhile
        # Beside the folder, so on the same disk: the renaming at the end is then one step.
        tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            yield tmp
            tmp.chmod(0o755)  # mkdtemp makes it for its owner alone, and so does safetensors a file
            for file in files.files_below(tmp):
                file.chmod(0o644)
            os.replace(tmp, folder)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def check_new_folder(folder: files.PathLike) -> None:
    """Raise where `new_folder` could not write: to fail before long work and not after it."""
    files.check_writable(folder, folder=True)
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise ValueError(f"save: {folder} is there already; give a new folder or remove it")
