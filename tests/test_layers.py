"""The import rule: a file imports only from lower layers, never from its own. This table is the map of the house."""

import ast
from pathlib import Path

LAYERS = [
    [
        "config",
        "tree",
        "files",
        "processes",
        "display",
        "rounding",
        "workers",
        "data.dicom_image",
        "data.names",
        "data.phantom_canvas",
        "data.phantom_styles",
    ],
    [
        "results",
        "answers",
        "choices",
        "layers",
        "losses",
        "optim",
        "metrics",
        "progress",
        "checkpoints",
        "dinov2",
        "data.scans",
        "data.slide_formats",
        "data.grids",
        "data.hounsfield",
        "data.metadata_table",
        "data.images",
        "data.order",
        "data.phantom_case",
        "data.phantom_modalities",
        "data.phantom_pictures",
        "data.phantom_slides",
        "data.phantom_tasks",
        "data.registry",
        "data.reports",
        "weights",
    ],
    ["accuracy", "quant", "lora", "shards", "slots", "qwen_vl", "intern_vl", "estimate", "data.conversations", "data.phantom_slide_talk"],
    [
        "hub",
        "tokens",
        "muon",
        "compose",
        "retrieve",
        "embed_local",
        "encode",
        "slide_classify",
        "slide_relevance",
        "fusion",
        "compressor",
        "projector",
        "text",
        "data.ct",
        "data.store",
        "data.conversation_files",
        "data.slide_questions",
        "slidebench",
        "data.slides",
        "data.vqa_rad",
        "data.phantom_chest",
        "data.phantom_report",
    ],
    [
        "train",
        "vlm",
        "embed",
        "adapter_cache",
        "adapter_files",
        "compressor_files",
        "evaluate",
        "plots",
        "report",
        "slide_maps",
        "data.ingest",
        "data.pairs",
        "data.phantoms",
        "data.slide_store",
    ],
    ["slide_tokens", "generation", "data.slide_check", "hlora_files", "retriever", "tuning", "systems.ct_clip"],
    ["chat", "systems.ct_clip_run"],
    ["experts", "systems.tune"],
    ["systems.adapters", "systems.slide_vqa", "systems.tune_run"],
    ["systems.adapters_score", "systems.slide_vqa_pretrain"],
    ["systems.adapters_report", "systems.slide_vqa_run"],
    ["systems.adapters_run", "systems.slide_vqa_look"],
    ["systems.ask", "systems.run"],
]
ONLY = {
    "transformers": ("hub", "tokens"),
    "bitsandbytes": ("quant",),
    "cattrs": ("config",),
    "pydicom": ("dicom_image",),
    "invoke": ("tasks",),
}
ROOT = Path(__file__).resolve().parents[1]
LEVEL = {f"medvl.{name}": level for level, names in enumerate(LAYERS) for name in names}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def test_every_file_imports_only_from_lower_layers():
    wrong = []
    for path in sorted((ROOT / "medvl").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        assert module in LEVEL, f"{module} has no layer: add it to LAYERS"
        wrong += [f"{module} imports {m}" for m in _imports(path) if m in LEVEL and LEVEL[m] >= LEVEL[module]]
    assert not wrong, wrong


def test_heavy_packages_have_their_doors():
    for path in [*sorted((ROOT / "medvl").rglob("*.py")), ROOT / "tasks.py"]:
        for name in _imports(path):
            top = name.split(".")[0]
            if top in ONLY:
                assert path.stem in ONLY[top], f"{path.relative_to(ROOT)} imports {top}; only {' and '.join(ONLY[top])} may"


def test_every_room_is_on_the_map():
    missing = [m for m in LEVEL if not (ROOT / (m.replace(".", "/") + ".py")).exists()]
    assert not missing, missing
