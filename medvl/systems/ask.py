"""What `invoke ask`, `invoke adapters` and `invoke slides` do: registries made and asked, slides asked, checked and packed."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, evolve, frozen

from medvl.adapters import embed, experts, registry, retrieve
from medvl.adapters.embed import EmbedConfig
from medvl.adapters.experts import Answer, Experts, FusionConfig, HoldConfig
from medvl.adapters.registry import AdapterRecord
from medvl.adapters.retrieve import RetrieveConfig
from medvl.base import config, files, processes
from medvl.base.display import track
from medvl.evaluation import report, results
from medvl.hub.checkpoints import find_file, read_json
from medvl.hub.peft_files import read_adapter
from medvl.language.chat import ChatConfig
from medvl.language.conversations import read_conversations, read_tasks, task_paths
from medvl.slides import check, pack
from medvl.slides.names import feature_files
from medvl.slides.questions import audit_slide_conversations
from medvl.slides.relevance import top_patches
from medvl.systems.adapters import record as adapters
from medvl.systems.adapters import run as adapters_run
from medvl.systems.adapters.run import build_registry, category_of, drawn, query_of
from medvl.systems.slide_vqa import look
from medvl.systems.tune import run as tune_run

_log = logging.getLogger("medvl")
ACTIONS = ("build", "add", "list", "show")


@frozen(kw_only=True)
class ChooseConfig:
    """How adapters are chosen for one question, and made one."""

    retrieve: RetrieveConfig = RetrieveConfig()
    fusion: FusionConfig = FusionConfig()
    hold: HoldConfig = HoldConfig()


@frozen(kw_only=True)
class AskConfig:
    """Settings of one question to a registry. A run has its own dtype, chat and device."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["none", "nf4", "fp4"] = "none"
    chat: ChatConfig = ChatConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    fusion: FusionConfig = FusionConfig()
    hold: HoldConfig = HoldConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    root: str = ""  # where the registry's relative paths start; "" = as it says, or at its folder


# What a question may be given with, by what is asked.
_TAKES = {
    "a registry": ("--image", "--mode", "-k", "--own", "--base", "--set"),
    "adapters": ("--image", "--mode", "-k", "--own", "--set"),
    "tune": ("--image",),
    "slide_vqa": ("--slide", "--offset"),
}


def ask(
    question: str,
    *,
    adapters: str = "",
    run: str = "",
    slide: str = "",
    images: Sequence[str] = (),
    mode: str = "",
    k: int = -1,
    own: str = "",
    base: str = "",
    out: str = "maps",
    max_tokens: int = 256,
    offset: str = "",
    overrides: Sequence[str] = (),
) -> None:
    """Print the answer of a registry of adapters, or of a run of any system that talks, and where it came from.

    Args:
        mode, k: "" and -1 are "mixture" and the run's `retrieve.k` (of a registry 3).
    Raises:
        ValueError: neither or both of a registry and a run; a run that does not talk; what that run cannot be given; as what answers.
    """
    if bool(adapters) == bool(run):
        raise ValueError(
            "ask: needs either --adapters REGISTRY (with --image), or --run RUN (with --image, or with --slide)"
        )
    if max_tokens < 1:
        raise ValueError(f"ask: --max-tokens must be 1 or more, got {max_tokens}")
    folder = config.run_folder(run) if run else Path()
    asked = config.system_of(folder) if run else "a registry"
    if asked not in _TAKES:
        raise ValueError(
            f"ask: {run} is a {asked} run, which does not talk; `invoke classify` tells findings"
        )
    given = {
        "--image": images,
        "--slide": slide,
        "--mode": mode,
        "-k": k >= 0,
        "--own": own,
        "--base": base,
        "--set": overrides,
    }
    given["--offset"] = offset
    if wrong := [flag for flag, value in given.items() if value and flag not in _TAKES[asked]]:
        raise ValueError(
            f"ask: {run or adapters} ({asked}) takes {' and '.join(_TAKES[asked])}, not {wrong[0]}"
        )
    if not question.strip():
        raise ValueError("ask: the question must have text, got none")
    if lost := [image for image in images if not Path(image).is_file()]:
        raise ValueError(f"ask: {lost[0]}: there is no such image")
    if asked == "slide_vqa":
        ask_slide(slide, question, str(folder), out, max_tokens, offset)
    elif asked == "tune":
        print(tune_run.ask(folder, question, images, max_tokens).strip())
        print(report.NOTICE)
    else:
        how: dict[str, Any] = {"mode": mode or "mixture", "own": own, "max_tokens": max_tokens}
        path = Path(adapters) if adapters else adapters_run.registry_of(folder)
        experts.check_mode(how["mode"], own, [r.name for r in registry.read_registry(path).adapters])
        of, choose = _of_run(folder, k, overrides) if run else _of_registry(adapters, k, base, overrides)
        _print_answer(experts.ask_experts(of, question, images, cfg=choose, **how))


def _of_registry(path: str, k: int, base: str, overrides: Sequence[str]) -> tuple[Experts, RetrieveConfig]:
    cfg = config.structure(config.override(_chosen({}, k), tuple(overrides), "ask"), AskConfig, "ask")
    how: dict[str, Any] = {
        "dtype": cfg.dtype,
        "quantize": cfg.quantize,
        "fusion": cfg.fusion,
        "hold": cfg.hold,
    }
    return experts.open_experts(
        path, base=base, root=cfg.root, cfg=cfg.chat, device=processes.choose_device(cfg.device), **how
    ), cfg.retrieve


def _of_run(folder: Path, k: int, overrides: Sequence[str]) -> tuple[Experts, RetrieveConfig]:
    model, params, _ = adapters_run.load(folder)
    own = ChooseConfig(retrieve=model.cfg.retrieve, fusion=model.cfg.fusion, hold=model.cfg.pool.hold)
    raw = config.override(_chosen(config.unstructure(own), k), tuple(overrides), "ask")
    cfg = config.structure(raw, ChooseConfig, "ask")
    asked = evolve(model.cfg, fusion=cfg.fusion, pool=evolve(model.cfg.pool, hold=cfg.hold))
    return adapters.gather(evolve(model, cfg=asked), params), cfg.retrieve


def _chosen(raw: dict[str, Any], k: int) -> dict[str, Any]:
    return raw if k < 0 else raw | {"retrieve": raw.get("retrieve", {}) | {"k": k}}


def _print_answer(said: Answer) -> None:
    print(said.text.strip())
    print()
    table = results.markdown_table(("Adapter", "Similarity", "Weight"), said.adapters)
    print(table if said.adapters else "no adapter: the bare model answered")
    print(report.NOTICE)


def ask_slide(slide: str, question: str, run: str, out: str, max_tokens: int, offset: str = "") -> None:
    """Print the answer of a slide_vqa run about one slide, and write the map of where it came from."""
    if not slide:
        raise ValueError(
            f"ask: {run} is a slide_vqa run and needs --slide: a file of patch features, STORE.h5::NAME, or a slide's name"
        )
    files.check_writable(out, folder=True)
    found = look.look_at_slide(run, slide, question, out, max_tokens, offset=_offset(offset))
    print(found["answer"].strip())
    print()
    rows = [
        (p.rank, p.x, p.y, f"{p.relevance:.1e}", p.percentile)
        for p in top_patches(found["relevance"], found["coords"], 5)
    ]
    print(
        results.markdown_table(("Patch", "x", "y", "Relevance", "Percentile"), rows) + f"map: {found['map']}"
    )
    print(report.NOTICE)


def _offset(text: str) -> tuple[int, int]:
    """(x, y) of "x,y", (0, 0) of nothing."""
    hit = re.fullmatch(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", text or "0,0")
    if hit is None:
        raise ValueError(f"ask: --offset must be x,y in level-0 pixels, such as 12288,2048, got {text!r}")
    return int(hit[1]), int(hit[2])


def slides(
    action: str, features: str, data: Sequence[str], out: str, dims: int, encoder: str, drop: bool
) -> int:
    """Print what is wrong with features and questions, or pack features into a store; returns the exit status, 0 or 3.

    Raises:
        ValueError: an unknown action, or an argument is missing.
    """
    if action == "pack":
        if not out:
            raise ValueError("slides pack: needs out, the store to make or go on with")
        files.check_writable(out)
        paths = [p for of in feature_files(features).values() for p in of]
        if not paths:
            raise ValueError(f"{features}: holds no patch features (.h5, .pt, .npy or .csv files)")
        done = pack.pack(paths, out, dims=dims, encoder=encoder, drop=drop, progress=True)
        print(
            f"{out}: {done.done} slides of {done.patches:,} patches written, {done.skipped} were there, {done.empty} are empty, "
            f"{done.dropped} patches left out"
        )
        return 0
    if action != "check":
        raise ValueError(f"slides: the action must be check or pack, got {action!r}")
    wanted, faults = dict[str, str](), 0
    for file in data:
        try:
            talks, bad = audit_slide_conversations(file)
        except ValueError as e:
            print(f"cannot be read: {e}")
            faults += 1
            continue
        for t in talks:
            wanted |= {s: f"{file}, record {t.row}" for s in t.slides if s not in wanted}
        faults += len(bad)
        print(f"{file}: {len(bad)} faulty records" + "".join(f"\n  {f.row}: {f.what}" for f in bad[:10]))
    if data and not wanted:
        raise ValueError(
            f"slides check: no record of {', '.join(data)} names a slide; without --data all features are looked at"
        )
    found = check.check_slides(features, wanted, dims=dims, encoder=encoder)
    print("\n".join(check.describe(found)))
    return 0 if found.ok and not faults else 3


def manage(
    action: str,
    registry_file: str,
    *,
    path: str = "",
    samples: str = "",
    name: str = "",
    vector: str = "",
    description: str = "",
    category: str = "",
    embedder: str = "",
    base: str = "",
    root: str = "",
    overrides: Sequence[str] = (),
) -> None:
    """Do what `action` says with a registry, and print the result.

    Args:
        path: of one adapter's folder; to build, with {task}, e.g. "adapters/{task}/v0-*/checkpoint-*".
        samples: conversations that an adapter was trained on; to build, a file for each {task}, or one whose lines say their task.
        base: hub name or folder of the model that all were trained on.
        root: where the registry's relative paths start, instead of what it says.
    Raises:
        ValueError: an unknown action, a missing or superfluous argument, and what the registry refuses.
    """
    where = Path(registry_file)
    if action not in ACTIONS:
        raise ValueError(f"adapters: the action must be one of {', '.join(ACTIONS)}, got {action!r}")
    if action in ("build", "add"):
        files.check_writable(where)
    if action == "build":
        _build(where, path, samples, embedder, base, overrides)
    elif action == "add":
        _add(where, root, path, samples, name, vector, description, category)
    print(_show(where, root, name) if action == "show" else _list(where, root, base))


def _build(
    where: Path, pattern: str, samples: str, embedder: str, base: str, overrides: Sequence[str]
) -> None:
    if where.exists():
        raise ValueError(f"adapters build: {where} is there; remove it, or add to it")
    if "{task}" not in pattern or not samples:
        raise ValueError(
            f"adapters build: needs path with {{task}} in it, e.g. 'adapters/{{task}}', and samples, got {pattern!r}, {samples!r}"
        )
    there = task_paths(pattern.rstrip("/"))
    found = {
        name: _newest(name, folders) for name, folders in there.items() if any(map(_is_adapter, folders))
    }
    if not found:
        raise ValueError(f"adapters build: no folder {pattern} with an adapter_config.json")
    if lost := sorted(there.keys() - found.keys()):
        _log.warning("adapters build: left out, there is no adapter_config.json: %s", ", ".join(lost))
    cfg = config.structure(
        config.override({"name": embedder, "kind": _kind(embedder)}, tuple(overrides), "build"),
        EmbedConfig,
        "build",
    )
    if "{task}" in samples:
        talks = {
            name: read_conversations(config.fill_pattern(samples, "adapters build: samples", task=name))
            for name in found
        }
    else:
        every = read_tasks(samples, "")
        talks = {name: [c for c in every if c.extra["task"] == name] for name in found}
    build_registry(
        where,
        {name: os.path.relpath(folder, where.parent) for name, folder in found.items()},
        talks,
        cfg,
        base=os.path.relpath(base, where.parent) if base and Path(base).is_dir() else base,
        categories={name: category_of(name, talks[name]) for name in found},
    )


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _newest(name: str, folders: Sequence[Path]) -> Path:
    """The last of an adapter's checkpoints by number."""
    there = [p for p in folders if _is_adapter(p)]
    if len(there) > 1:
        _log.warning("%s: %d folders match, the last one is taken: %s", name, len(there), there[-1])
    return there[-1]


def _add(
    where: Path, root: str, folder: str, samples: str, name: str, vector: str, description: str, category: str
) -> None:
    if not name or not folder or bool(samples) == bool(vector):
        raise ValueError(
            "adapters add: needs name, path (the adapter's folder), and either samples (JSONL) or vector (.npy)"
        )
    files.check_name(name, "adapters add: the adapter")
    held = registry.read_registry(where, root) if where.exists() else registry.Registry()
    if name in {r.name for r in held.adapters}:
        raise ValueError(f"adapters add: {where} has an adapter {name!r} already; give another name")
    place = registry.registry_root(where, held)
    if vector:
        mean, count, made = files.open_array(vector), 0, ""
    elif not held.embedder:
        raise ValueError(
            f"adapters add: {where} has no embedder, so samples cannot be embedded; give vector, or build the registry"
        )
    else:
        maker, talks = embed.read_embedder(place / held.embedder), read_conversations(samples)
        chosen, category = drawn(talks, 20, 0), category or category_of(name, talks)
        vectors = embed.embed_queries(
            maker, [query_of(c)[0] for c in chosen], [query_of(c)[1] for c in chosen]
        )
        mean, count, made = retrieve.adapter_vector(vectors).numpy(), len(chosen), maker.name
    about = {
        "name": name,
        "path": os.path.relpath(folder, place),
        "description": description,
        "category": category,
    }
    registry.add_adapter(where, AdapterRecord(**about, vector="", samples=count, embedder=made), mean, root)


def _list(where: Path, root: str, base: str) -> str:
    held = registry.read_registry(where, root)
    registry.check_registry(where, held, base)
    rows = []
    for r in track(held.adapters, "reading adapters"):
        adapter = read_adapter(registry.registry_root(where, held) / r.path)
        ranks = sorted({adapter.rank(m) for m in adapter.factors})
        rows.append(
            (r.name, r.category, "/".join(map(str, ranks)), len(adapter.factors), r.samples, r.description)
        )
    made = next((r.embedder for r in held.adapters if r.embedder), "an embedder that is not named")
    head = f"base model {base or registry.base_model(where, held) or 'not named'}, vectors by {made}"
    return (
        head
        + "\n"
        + results.markdown_table(("Adapter", "Category", "Rank", "Layers", "Samples", "Description"), rows)
    )


def _show(where: Path, root: str, name: str) -> str:
    held = registry.read_registry(where, root)
    found = {r.name: r for r in held.adapters}
    if name not in found:
        raise ValueError(f"adapters show: no adapter {name!r} in {where}; there are {', '.join(found)}")
    adapter, vectors = (
        read_adapter(registry.registry_root(where, held) / found[name].path),
        registry.read_vectors(where, held),
    )
    near = vectors @ vectors[[*found].index(name)]
    about = [f"{k}: {v}" for k, v in asdict(found[name]).items() if v not in ("", 0)]
    numbers = sum(t.numel() for f in adapter.factors.values() for t in f.values())
    about.append(
        f"layers: {len(adapter.factors)}, ranks {sorted({adapter.rank(m) for m in adapter.factors})}, {numbers:,} numbers"
    )
    rows = sorted(((n, float(v)) for n, v in zip(found, near, strict=True) if n != name), key=lambda r: -r[1])
    return "\n".join(about) + "\n\n" + results.markdown_table(("Most like it", "Cosine"), rows[:5])


def _kind(embedder: str) -> str:
    """The kind of an encoder by its config: one with two towers, or of text alone."""
    if not embedder:
        return "local"
    return "image_text" if "vision_config" in read_json(find_file(embedder, ("config.json",))) else "text"
