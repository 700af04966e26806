"""Drawn whole slides as patch features, with captions and multiple-choice questions about what was drawn. Free of patients.

A slide is a few pieces of tissue cut into patches. A patch has the prototype of its tissue as features, with variation and noise, and all
are shifted by the slide's stain. Four slides in five have a rare motif, in one patch or a few of 10,000: a direction of its own, of which
the mean over the slide shows nothing.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
import h5py
import numpy as np
from attrs import frozen

from medvl import files

Array = np.ndarray
SPLITS = ("train", "valid", "test")
OPTIONAL = ("fat", "normal epithelium", "muscle", "mucus")  # a slide has two of them
TISSUES = ("stroma", "tumour", "necrosis", "lymphocytes", *OPTIONAL)
CLASSES = {  # of the tumour: code, treatment
    "adenocarcinoma": ("ADC", "Surgical resection"),
    "squamous cell carcinoma": ("SCC", "Radiotherapy"),
    "small cell carcinoma": ("SMC", "Platinum chemotherapy"),
    "melanoma": ("MEL", "Checkpoint inhibitor"),
}
MOTIFS = {"mitosis cluster": "tumour", "vascular invasion": "stroma", "granuloma": "stroma", "microcalcification": "tumour"}  # and where
NO_MOTIF = "none"
NECROSIS = ((0.01, 0.03), (0.08, 0.12), (0.17, 0.2))  # share of the patches, by grade
LYMPHOCYTES = {"low": (0.01, 0.03), "high": (0.12, 0.16)}
COLUMNS = ("ID", "Slide", "Tumor", "Broad Category", "Narrow Category", "Question", "A", "B", "C", "D", "Answer")
_LABELS = ("slide", "split", "class", "grade", "lymphocytes", "motif")
_CAPTIONS = 2  # of each slide
_BLOCK = 60  # slides within which every label and every answer letter is balanced: a multiple of 2, 3, 4, 5 and 6
_FILLED = 0.4  # share of the grid that is tissue
_SMALLEST_LARGE = 20_000  # patches
_CHUNK = 8192  # patches at a time


@frozen(kw_only=True)
class SlideConfig:
    """How many slides of each split, and how large they are. Multiples of 60 slides are balanced exactly."""

    train: int = 600
    valid: int = 60
    test: int = 120
    dim: int = 64  # of the features
    patches: tuple[int, int] = (300, 4000)  # of a slide, log-uniform
    large: int = 4  # the first so many test slides have 200,000 patches down to 20,000, in equal ratios
    largest: int = 200_000
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        low, high = self.patches
        if min(self.train, self.valid, self.test) < 1 or not 0 <= self.large <= self.test:
            raise ValueError(f"SlideConfig: needs slides in every split and large of 0 to test, got {self}")
        if not 100 <= low <= high or self.largest < _SMALLEST_LARGE:
            raise ValueError(f"SlideConfig: patches must be 100 <= low <= high, largest >= {_SMALLEST_LARGE}, got {self}")
        if self.dim < 32 or self.seed < 0:
            raise ValueError(f"SlideConfig: needs dim >= 32 and seed >= 0, got dim={self.dim}, seed={self.seed}")


@frozen(kw_only=True)
class Truth:
    """What a slide holds; every question can be answered from it."""

    name: str
    patches: int
    tumour_class: str  # of CLASSES
    grade: int  # 1 to 3, by the share of necrosis
    lymphocytes: str  # "low" or "high"
    motif: str  # of MOTIFS, or NO_MOTIF
    motif_patches: int
    dominant: str  # the tissue with most patches: stroma, tumour or one of OPTIONAL
    tissues: dict[str, int]  # patches of every tissue that is there


@frozen(kw_only=True, eq=False)
class DrawnSlide:
    """A slide, its n patches row by row."""

    name: str
    features: Array  # float16 [n, d]
    coords: Array  # int64 [n, 2], x and y of the upper left corner, pixels of level 0
    patch_size: int  # pixels of level 0
    truth: Truth
    tissue: Array  # int64 [n], index of TISSUES; a motif's patch has the tissue around it
    motif_rows: Array  # int64 [m], the patches of the rare motif


@frozen(kw_only=True)
class Question:
    """One multiple-choice question of a slide."""

    family: str  # of FAMILIES, which say its categories and the facts that it takes
    question: str
    options: tuple[str, ...]  # 2 to 4
    letter: str  # of the right one


@frozen(kw_only=True, eq=False)
class Prototypes:
    """What all slides of a seed and width share, float32. Tissues, classes and motifs are orthogonal."""

    tissues: Array  # [tissue, d]
    classes: Array  # [class, d], added to the tumour's
    motifs: Array  # [motif, d], added to the surrounding tissue's
    stain: Array  # [3, d], directions in which slides differ
    spread: Array  # [8, d], directions in which patches differ
    strength: Array  # [tissue, 8], how much they do


def draw_slides(cfg: SlideConfig, folder: files.PathLike) -> dict[str, int]:
    """Write slides, captions and questions: features in TRIDENT's layout, tables in the shapes of SlideChat and SlideBench.

    - features/{name}.h5: "features" float16 [n, d], "coords" int64 [n, 2] with the attributes patch_size, patch_size_level0 and so on.
    - captions.json (of train slides, two each), train.json, valid.json (a question each, answered "C. Text"): lists of {"id", "image":
      ["./features/{name}.h5"], "conversations": [{"from", "value"}, ...]}.
    - test.csv: `COLUMNS`; "Tumor" is the code of the tumour's class, empty options are of questions with fewer than four.
    - labels.csv: slide, split, class, grade, lymphocytes, motif.
    - truth.jsonl: a line per slide: "split", the fields of `Truth`, "motif_rows", "questions" (id, family, narrow, facts) in the order of
      the tables.

    Tables come after the slides, truth.jsonl last: no slide is drawn if it is there. Any table that is there is left alone.
    Returns:
        number of "slides", "captions", and questions of "train", "valid", "test".
    """
    folder, asked = Path(folder), dict[str, list[tuple[Truth, list[Question]]]]()
    motif_rows = None if (folder / "truth.jsonl").exists() else _write_slides(cfg, folder / "features")
    for split in SPLITS:
        asked[split] = [(draw_truth(cfg, split, i), questions(cfg, split, i)) for i in range(getattr(cfg, split))]
    told = [(truth, *said) for i, (truth, _) in enumerate(asked["train"]) for said in captions(cfg, "train", i)]
    texts = {f"{split}.json": _json(_conversations(split, asked[split])) for split in ("train", "valid")}
    texts["captions.json"] = _json(_turns(f"caption::{i}", *what) for i, what in enumerate(told))
    for name, text in texts.items():
        if not (folder / name).exists():
            files.write_text(folder / name, text)
    if not (folder / "test.csv").exists():
        files.write_csv(folder / "test.csv", _bench("test", asked["test"]), COLUMNS)
    if not (folder / "labels.csv").exists():
        files.write_csv(folder / "labels.csv", [_label(s, truth) for s in SPLITS for truth, _ in asked[s]], _LABELS)
    if motif_rows is not None:
        lines = [_truth_line(s, i, *what, motif_rows[what[0].name]) for s in SPLITS for i, what in enumerate(asked[s])]
        files.write_text(folder / "truth.jsonl", "".join(lines))
    return {"slides": sum(map(len, asked.values())), "captions": len(told)} | {s: len(asked[s]) * len(FAMILIES) for s in SPLITS}


def draw_slide(cfg: SlideConfig, split: str, number: int) -> DrawnSlide:
    """The slide, a pure function of (cfg.seed, cfg.dim, its number of patches, split, number).

    Raises:
        ValueError: no such split, or number < 0.
    """
    truth, gen = draw_truth(cfg, split, number), _gen(cfg, 1, split, number)
    size = 256 << int(gen.integers(2))
    cells = _outline(truth.patches, gen)
    tissue = _regions(truth, cells, gen)
    motif_rows = _motif_rows(truth, cells, tissue, gen)
    features = _features(cfg, truth, tissue, motif_rows, gen)
    coords = cells[:, ::-1] * size + gen.integers(4 * size, size=2)
    return DrawnSlide(name=truth.name, features=features, coords=coords, patch_size=size, truth=truth, tissue=tissue, motif_rows=motif_rows)


def draw_truth(cfg: SlideConfig, split: str, number: int) -> Truth:
    """What `draw_slide` draws. Of 60 slides from a multiple of 60 on, every class, grade, motif ... has its exact share.

    Raises:
        ValueError: as `draw_slide`.
    """
    if split not in SPLITS or number < 0:
        raise ValueError(f"draw_truth: split must be of {', '.join(SPLITS)} and number >= 0, got {split!r}, {number}")
    gen = _gen(cfg, 0, split, number)
    pick = lambda use, k: _balanced(cfg, use, split, number) % k
    low, high = cfg.patches
    n = round(float(np.exp(gen.uniform(np.log(low), np.log(high)))))
    if split == "test" and number < cfg.large:
        n = round(float(np.geomspace(cfg.largest, _SMALLEST_LARGE, cfg.large)[number]))
    grade, lymphocytes, pair = pick(1, 3), tuple(LYMPHOCYTES)[pick(2, 2)], pick(3, 6)
    motif = (*MOTIFS, NO_MOTIF)[pick(4, 5)]
    main = ("stroma", "tumour", *(OPTIONAL[i] for i in np.argwhere(np.triu(np.ones((4, 4)), 1))[pair]))
    dominant = main[pick(5, 4)]
    few = {"necrosis": gen.uniform(*NECROSIS[grade]), "lymphocytes": gen.uniform(*LYMPHOCYTES[lymphocytes])}
    weights = {t: gen.uniform(2.6, 3.2) if t == dominant else gen.uniform(0.85, 1.15) for t in main}
    shares = few | {t: w / sum(weights.values()) * (1 - sum(few.values())) for t, w in weights.items()}
    counts = {t: max(1, round(shares[t] * n)) for t in TISSUES if t in shares}
    counts[dominant] += n - sum(counts.values())
    return Truth(
        name=f"TCGA-{split[:2].upper()}-{number:04d}-01Z-00-DX1",
        patches=n,
        tumour_class=tuple(CLASSES)[pick(6, 4)],
        grade=grade + 1,
        lymphocytes=lymphocytes,
        motif=motif,
        motif_patches=0 if motif == NO_MOTIF else max(1, round(n * gen.uniform(1e-4, 5e-4))),
        dominant=dominant,
        tissues=counts,
    )


def questions(cfg: SlideConfig, split: str, number: int) -> list[Question]:
    """One question of every family about a slide; the letters of right answers are balanced over 60 slides in every family."""
    truth, found = draw_truth(cfg, split, number), []
    for k, (name, family) in enumerate(FAMILIES.items()):
        gen = _gen(cfg, 2, split, number, k)
        subject, right, wrong = _choices(name, truth, gen)
        place = _balanced(cfg, 10 + k, split, number) % (len(wrong) + 1)
        options = [str(w) for w in gen.permutation(wrong)]
        options.insert(place, right)
        question = str(gen.choice(family.asks)).format(subject=subject)
        shown = tuple(_sentence(o) for o in options)
        found.append(Question(family=name, question=question, options=shown, letter="ABCD"[place]))
    return found


def captions(cfg: SlideConfig, split: str, number: int) -> list[tuple[str, str]]:
    """(what is asked, caption) twice: five short sentences in any order, each in one of several phrasings."""
    t, found = draw_truth(cfg, split, number), []
    others = [x for x in OPTIONAL if x in t.tissues]
    words = {"tumour": t.tumour_class, "grade": t.grade, "dominant": t.dominant, "one": others[0], "two": others[1], "motif": t.motif}
    for i in range(_CAPTIONS):
        gen = _gen(cfg, 3, split, number, i)
        kinds = [CAPTION_CLASS, CAPTION_TISSUES, CAPTION_NECROSIS[t.grade - 1], CAPTION_LYMPHOCYTES[t.lymphocytes]]
        kinds.append(CAPTION_NO_MOTIF if t.motif == NO_MOTIF else CAPTION_MOTIF)
        said = [str(gen.choice(kinds[k])).format(**words) for k in gen.permutation(len(kinds))]
        found.append((str(gen.choice(CAPTION_ASKS)), " ".join(map(_sentence, said))))
    return found


def prompt(question: str, options: tuple[str, ...]) -> str:
    """What is asked of a model, as SlideChat's test script writes it."""
    return "\n".join(["<image>", question, *(f"{letter}. {o}" for letter, o in zip("ABCD", options, strict=False))])


def prototypes(cfg: SlideConfig) -> Prototypes:
    """A pure function of (cfg.seed, cfg.dim)."""
    gen = np.random.default_rng([9, cfg.seed, cfg.dim])
    sizes = [len(TISSUES), len(CLASSES), len(MOTIFS)]
    axes = np.linalg.qr(gen.standard_normal((cfg.dim, sum(sizes))))[0].T.astype(np.float32)
    tissues, classes, motifs = np.split(axes, np.cumsum(sizes)[:-1])
    loose = gen.standard_normal((3 + _RANK, cfg.dim), np.float32)
    loose /= np.linalg.norm(loose, axis=1, keepdims=True)
    return Prototypes(
        tissues=tissues * 4,
        classes=classes * 3,
        motifs=motifs * _MOTIF,
        stain=loose[:3],
        spread=loose[3:],
        strength=gen.uniform(0.2, 1.0, (len(TISSUES), _RANK)).astype(np.float32),
    )


def _gen(cfg: SlideConfig, use: int, split: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([use, cfg.seed, SPLITS.index(split), *numbers])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _balanced(cfg: SlideConfig, use: int, split: str, number: int) -> int:
    """0 to 59, each once in every 60 slides."""
    return int(_gen(cfg, 4, split, number // _BLOCK, use).permutation(_BLOCK)[number % _BLOCK])


# Pictures ---------------------------------------------------------------------------------------------------------------------------------
_RANK = 8  # of the variation within a tissue
_NOISE = 0.5  # of every feature
_MOTIF = 6.0  # length of a motif's direction: twelve times the noise
_STAIN = (1.0, 0.1)  # of a slide's shift: along the stain's directions, and of every feature


def _bumps(rows: Array, columns: Array, at: Array, width: Array) -> tuple[Array, Array]:
    """Gaussian bumps as a product: [row, bump], [column, bump]. `rows` and `columns` in the units of `at` [bump, 2] and `width` [bump]."""
    along = [np.exp(-0.5 * ((x[:, None] - at[:, i]) / width) ** 2).astype(np.float32) for i, x in enumerate((rows, columns))]
    return along[0], along[1]


def _outline(n: int, gen: np.random.Generator) -> Array:
    """Row and column [n, 2] of a slide's patches, row by row: one to three pieces with uneven edges."""
    height = int(np.ceil(np.sqrt(n / _FILLED * gen.uniform(0.6, 1.6))))
    width = int(np.ceil(n / _FILLED / height))
    pieces = int(gen.integers(1, 4))
    at = np.concatenate([gen.uniform(0.22, 0.78, (pieces, 2)), gen.uniform(0, 1, (24, 2))])
    size = np.concatenate([gen.uniform(0.14, 0.24, pieces), gen.uniform(0.03, 0.1, 24)])
    high = np.concatenate([np.ones(pieces), gen.uniform(-0.3, 0.3, 24)]).astype(np.float32)
    rows, columns = _bumps(np.linspace(0, 1, height), np.linspace(0, 1, width), at, size)
    land = (rows * high) @ columns.T
    inside = np.sort(np.argpartition(-land.ravel(), n - 1)[:n])
    return np.stack(np.divmod(inside, width), 1)


def _regions(truth: Truth, cells: Array, gen: np.random.Generator) -> Array:
    """The tissue [n] of every patch. Each takes the highest places of a land of its own that are left; stroma has the rest."""
    tissue, rest = np.zeros(len(cells), np.int64), np.arange(len(cells))
    top = cells.max(0) + 1
    for name in gen.permutation([t for t in truth.tissues if t != "stroma"]):
        at = cells[gen.choice(rest, 3)]
        size = gen.uniform(0.06, 0.16, 3) * top.mean()
        rows, columns = _bumps(np.arange(top[0]), np.arange(top[1]), at, size)
        land = np.einsum("nk,nk->n", rows[cells[rest, 0]], columns[cells[rest, 1]])
        land += 0.05 * gen.random(len(rest), np.float32)  # ragged edges
        taken = np.argpartition(-land, truth.tissues[name] - 1)[: truth.tissues[name]]
        tissue[rest[taken]] = TISSUES.index(name)
        rest = np.delete(rest, taken)
    return tissue


def _motif_rows(truth: Truth, cells: Array, tissue: Array, gen: np.random.Generator) -> Array:
    if truth.motif == NO_MOTIF:
        return np.zeros(0, np.int64)
    host = np.flatnonzero(tissue == TISSUES.index(MOTIFS[truth.motif]))
    far = ((cells[host] - cells[gen.choice(host)]) ** 2).sum(1)
    return np.sort(host[np.argsort(far, kind="stable")[: truth.motif_patches]])


def _features(cfg: SlideConfig, truth: Truth, tissue: Array, motif_rows: Array, gen: np.random.Generator) -> Array:
    p = prototypes(cfg)
    base = p.tissues.copy()
    base[TISSUES.index("tumour")] += p.classes[list(CLASSES).index(truth.tumour_class)]
    base += _STAIN[0] * gen.standard_normal(len(p.stain), np.float32) @ p.stain + _STAIN[1] * gen.standard_normal(cfg.dim, np.float32)
    out = np.empty((len(tissue), cfg.dim), np.float16)
    for start in range(0, len(tissue), _CHUNK):
        kinds = tissue[start : start + _CHUNK]
        x = gen.standard_normal((len(kinds), cfg.dim), np.float32)
        x *= _NOISE
        x += (gen.standard_normal((len(kinds), _RANK), np.float32) * p.strength[kinds]) @ p.spread
        x += base[kinds]
        if len(here := motif_rows[(motif_rows >= start) & (motif_rows < start + len(kinds))]):
            x[here - start] += p.motifs[list(MOTIFS).index(truth.motif)]
        out[start : start + len(kinds)] = x
    return out


# Files ------------------------------------------------------------------------------------------------------------------------------------
def _write_slides(cfg: SlideConfig, folder: Path) -> dict[str, list[int]]:
    """The rows of the rare motif, by the slide's name."""
    found = {}
    for split in SPLITS:
        for number in range(getattr(cfg, split)):
            slide = draw_slide(cfg, split, number)
            _write_slide(folder / f"{slide.name}.h5", slide)
            found[slide.name] = slide.motif_rows.tolist()
    return found


def _write_slide(path: Path, slide: DrawnSlide) -> None:
    right, bottom = slide.coords.max(0) + slide.patch_size
    level = slide.patch_size // 256  # 20x, or 40x read at half its resolution
    said = {"patch_size": 256, "patch_size_level0": slide.patch_size, "level0_magnification": 20 * level, "target_magnification": 20}
    said |= {"overlap": 0, "level0_width": int(right), "level0_height": int(bottom)}
    with files.atomic(path) as tmp, h5py.File(tmp, "w") as f:
        f["features"], f["coords"] = slide.features, slide.coords
        f["features"].attrs.update({"name": slide.name, "encoder": "phantom"})
        f["coords"].attrs.update({"name": slide.name} | said)


def _json(items: Iterable[dict]) -> str:
    return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n"


def _turns(name: str, truth: Truth, asked: str, answer: str) -> dict:
    talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": [f"./features/{truth.name}.h5"], "conversations": talk}


def _ids(split: str, i: int) -> list[str]:
    return [f"{split}::{i * len(FAMILIES) + k}" for k in range(len(FAMILIES))]


def _conversations(split: str, asked: list[tuple[Truth, list[Question]]]) -> Iterator[dict]:
    for i, (truth, every) in enumerate(asked):
        for name, q in zip(_ids(split, i), every, strict=True):
            yield _turns(name, truth, prompt(q.question, q.options), f"{q.letter}. {q.options['ABCD'.index(q.letter)]}")


def _bench(split: str, asked: list[tuple[Truth, list[Question]]]) -> Iterator[dict]:
    for i, (truth, every) in enumerate(asked):
        for name, q in zip(_ids(split, i), every, strict=True):
            options = [*q.options, "", ""][:4]
            f, code = FAMILIES[q.family], CLASSES[truth.tumour_class][0]
            about = (name, truth.name, code, f.broad, f.narrow, q.question, *options, q.letter)
            yield dict(zip(COLUMNS, about, strict=True))


def _label(split: str, t: Truth) -> dict:
    return dict(zip(_LABELS, (t.name, split, t.tumour_class, t.grade, t.lymphocytes, t.motif), strict=True))


def _truth_line(split: str, i: int, truth: Truth, asked: list[Question], motif_rows: list[int]) -> str:
    kinds = [(q.family, FAMILIES[q.family]) for q in asked]
    about = [{"id": n, "family": k, "narrow": f.narrow, "facts": f.facts} for n, (k, f) in zip(_ids(split, i), kinds, strict=True)]
    return json.dumps({"split": split, **attrs.asdict(truth), "motif_rows": motif_rows, "questions": about}) + "\n"


# What is asked and said -------------------------------------------------------------------------------------------------------------------
@frozen(kw_only=True)
class Family:
    """Questions about one thing; {subject} is what `_choices` says."""

    broad: str
    narrow: str
    facts: tuple[str, ...]  # fields of Truth that it takes to answer
    asks: tuple[str, ...]


def _family(place: str, fact: str, *asks: str) -> Family:
    broad, narrow = place.split("/")
    return Family(broad=broad, narrow=narrow, facts=(fact,), asks=asks)


def _choices(family: str, t: Truth, gen: np.random.Generator) -> tuple[str, str, list[str]]:
    """(subject, right option, wrong ones)."""
    there, absent = ([x for x in OPTIONAL if (x in t.tissues) == here] for here in (True, False))
    grade, classes, motifs = t.grade - 1, list(CLASSES), [*MOTIFS, NO_MOTIF]
    one_of = lambda right, every: ("", right, [x for x in every if x != right])
    if family == "present":
        return "", str(gen.choice(there)), absent
    if family in ("tissue", "motif_there"):  # as often yes as no: four of five slides have a motif
        if family == "tissue":
            yes = gen.random() < 0.5
            subject = gen.choice(there if yes else absent)
        else:
            yes = t.motif != NO_MOTIF and gen.random() < 5 / 8
            subject = t.motif if yes else gen.choice([m for m in MOTIFS if m != t.motif])
        return str(subject), *(("yes", ["no"]) if yes else ("no", ["yes"]))
    if family == "motif":
        wrong = gen.permutation([m for m in motifs if m != t.motif])[:3]
        return "", t.motif, [str(w) for w in wrong]
    if family == "differential":
        return "", t.tumour_class, [str(gen.choice([c for c in classes if c != t.tumour_class]))]
    return {
        "dominant": one_of(t.dominant, [x for x in t.tissues if x not in ("necrosis", "lymphocytes")]),
        "necrosis": one_of(NECROSIS_WORDS[grade], NECROSIS_WORDS),
        "lymphocytes": one_of(LYMPHOCYTE_WORDS[t.lymphocytes], LYMPHOCYTE_WORDS.values()),
        "class": one_of(t.tumour_class, classes),
        "grade": one_of(f"grade {t.grade}", [f"grade {i}" for i in (1, 2, 3)]),
        "treatment": one_of(CLASSES[t.tumour_class][1], [name for _, name in CLASSES.values()]),
        "immune": one_of(IMMUNE_WORDS[t.lymphocytes], IMMUNE_WORDS.values()),
        "outlook": one_of(OUTLOOK_WORDS[grade], OUTLOOK_WORDS),
    }[family]


NECROSIS_WORDS = ("under 5 percent", "5 to 15 percent", "over 15 percent")
LYMPHOCYTE_WORDS = {"low": "sparse", "high": "dense"}
IMMUNE_WORDS = {"low": "immune desert", "high": "inflamed"}
OUTLOOK_WORDS = ("favourable", "intermediate", "poor")
_ARCHITECTURE, _RARE = "Microscopy/Tissue Architecture and Arrangement", "Microscopy/Rare Motifs"
_HOW_DENSE = ("How dense is the lymphocytic infiltrate?", "How are lymphocytes distributed?", "Describe the lymphocytes.")
_HOW_MUCH = ("How much of the tissue is necrotic?", "What is the share of necrosis?", "How large is the necrotic area?")
_WHICH_MOST = ("Which tissue takes the largest area?", "What is the dominant tissue of the slide?", "Which tissue is most abundant?")
_WHICH_HERE = ("Which of these tissues is present?", "Which of these tissues can be seen?", "Which tissue does the slide contain?")
_WHICH_RARE = ("Which rare finding is on the slide?", "Which of these small findings is there?", "Name the rare finding.")
_WHICH_TYPE = ("What is the most likely diagnosis?", "Which type of tumour is this?", "How is the tumour classified?")
_WHICH_OF_TWO = ("Which of these two diagnoses fits better?", "Which diagnosis do the features support?", "Which of the two is it?")
_WHICH_HELPS = ("Which treatment fits this tumour?", "What should be offered first?", "Which therapy does the diagnosis call for?")
_WHICH_IMMUNE = ("Which immune phenotype is it?", "How is the immune status?", "Which immune type does the slide suggest?")
_WHICH_GRADE = ("What is the grade of the tumour?", "Which grade is it?", "How is the tumour graded?")
_WHICH_COURSE = ("What is the outlook?", "Which prognosis does the grade suggest?", "How is the expected course?")
FAMILIES = {
    "dominant": _family(_ARCHITECTURE, "dominant", *_WHICH_MOST),
    "present": _family(_ARCHITECTURE, "tissues", *_WHICH_HERE),
    "tissue": _family(_ARCHITECTURE, "tissues", "Is {subject} present?", "Does the slide contain {subject}?", "Can {subject} be seen?"),
    "necrosis": _family("Microscopy/Histopathological Changes", "grade", *_HOW_MUCH),
    "lymphocytes": _family("Microscopy/Cytomorphological Characteristics", "lymphocytes", *_HOW_DENSE),
    "motif": _family(_RARE, "motif", *_WHICH_RARE),
    "motif_there": _family(_RARE, "motif", "Is there any {subject}?", "Does the slide show {subject}?", "Is {subject} found anywhere?"),
    "class": _family("Diagnosis/Disease Classification", "tumour_class", *_WHICH_TYPE),
    "differential": _family("Diagnosis/Differential Diagnosis", "tumour_class", *_WHICH_OF_TWO),
    "grade": _family("Diagnosis/Grading", "grade", *_WHICH_GRADE),
    "treatment": _family("Clinical/Treatment Guidance", "tumour_class", *_WHICH_HELPS),
    "immune": _family("Clinical/Biomarker Analysis", "lymphocytes", *_WHICH_IMMUNE),
    "outlook": _family("Clinical/Prognostic Assessment", "grade", *_WHICH_COURSE),
}
CAPTION_ASKS = ("<image>\nDescribe the slide.", "<image>\nWhat does the slide show?", "<image>\nWrite a short report of the slide.")
CAPTION_CLASS = ("this is a {tumour} of grade {grade}.", "grade {grade} {tumour}.", "the tumour is a {tumour}, grade {grade}.")
CAPTION_TISSUES = (
    "{dominant} dominates, with {one} and {two} present.",
    "the largest area is {dominant}; {one} and {two} are seen.",
    "the most abundant tissue is {dominant}. There is {one} and {two}.",
)
CAPTION_NECROSIS = (
    ("necrosis is under 5 percent.", "there is hardly any necrosis."),
    ("necrosis takes 5 to 15 percent.", "there is some necrosis."),
    ("necrosis takes over 15 percent.", "there is much necrosis."),
)
CAPTION_LYMPHOCYTES = {
    "low": ("lymphocytes are sparse.", "few lymphocytes, an immune desert."),
    "high": ("lymphocytes are dense.", "many lymphocytes, an inflamed tumour."),
}
CAPTION_MOTIF = ("a rare finding is {motif}.", "there is {motif}.", "{motif} is found.")
CAPTION_NO_MOTIF = ("no rare finding.", "there is no rare finding.", "rare findings are not seen.")
