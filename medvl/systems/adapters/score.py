"""The answers that adapters is judged by: every turn of the test conversations, in every mode, in and out of domain; resumable."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from medvl.adapters import experts, registry
from medvl.adapters.experts import Experts, Mode
from medvl.adapters.retrieve import Retrieved
from medvl.base import config, files, progress
from medvl.base.display import track
from medvl.base.progress import Line
from medvl.evaluation import answers
from medvl.language import chat
from medvl.language.conversations import Conversation
from medvl.systems.adapters.record import Config

_log = logging.getLogger("medvl")
_LINE = {"answer", "right", "gold", "task", "episode", "adapters"}  # what every line of answers has


@frozen(kw_only=True)
class Step:
    """One question: a turn of the assistant with all that stands before it."""

    talk: Conversation  # ends with the written answer
    task: str
    category: str
    episode: str
    turn: int  # of the episode's conversation, from 0

    @property
    def gold(self) -> str:
        """The written answer."""
        return self.talk.messages[-1]["content"]

    @property
    def query(self) -> tuple[str, tuple[Path, ...]]:
        """What adapters are found by: the question; its images, or those of earlier turns where it has none."""
        asked = self.talk.messages[-2]["content"]
        return asked, self.talk.images[
            len(self.talk.images) - asked.count("<image>") :
        ] if "<image>" in asked else self.talk.images


@frozen(kw_only=True)
class Run:
    """One column of the table: a mode, in or out of domain, with k adapters."""

    mode: Mode
    domain: str
    k: int

    def name(self, cfg: Config) -> str:
        return f"{self.mode}{f' of {self.k}' if self.k != cfg.retrieve.k else ''}"


def steps_of(held: Sequence[Conversation], cfg: Config) -> list[Step]:
    """Every turn of the assistant as a step; conversations without an episode are one each."""
    found, taken = list[Step](), dict[str, int]()
    for c in held:
        task = str(c.extra["task"])
        taken[task] = taken.get(task, 0) + 1
        if cfg.evaluate.limit and taken[task] > cfg.evaluate.limit:
            continue
        episode = str(c.extra.get("episode_id") or c.id or f"line {c.line}")
        about: dict[str, Any] = {
            "task": task,
            "category": str(c.extra.get(cfg.data.category, "")),
            "episode": f"{task}: {episode}",
        }
        ends = [i for i, m in enumerate(c.messages) if m["role"] == "assistant"]
        for turn, i in enumerate(ends):
            said = c.messages[: i + 1]
            seen = sum(m["content"].count("<image>") for m in said)
            found.append(Step(talk=evolve(c, messages=said, images=c.images[:seen]), turn=turn, **about))
    return found


def runs_of(cfg: Config) -> list[Run]:
    """What is run; modes that know no domain are run once."""
    found, k = list[Run](), cfg.retrieve.k
    for mode in cfg.evaluate.modes:
        domains = cfg.evaluate.domains[:1] if mode in ("bare", "oracle") else cfg.evaluate.domains
        found += [Run(mode=mode, domain=d, k=k) for d in domains]
    found += [
        Run(mode="mixture", domain=d, k=n) for d in cfg.evaluate.domains for n in cfg.evaluate.by_k if n != k
    ]
    return found


def queries_of(of: Experts, steps: Sequence[Step], cfg: Config) -> Tensor:
    """Embeddings of the steps, or of the first of their episodes, float32 [n, d]; nan where there is nothing to embed (it warns)."""
    first = dict[str, int]()
    place = [
        first.setdefault(s.episode, i) if cfg.evaluate.per == "episode" else i for i, s in enumerate(steps)
    ]
    asked = {i: n for n, i in enumerate(sorted({*place}))}
    vectors = experts.embed_questions(
        of, [steps[i].query[0] for i in asked], [steps[i].query[1] for i in asked]
    )
    return vectors[[asked[i] for i in place]]


def chosen(run: Run, of: Experts, steps: Sequence[Step], queries: Tensor, cfg: Config) -> Retrieved:
    """Which adapters each step gets; out of domain not its own."""
    own = torch.tensor([of.names.index(s.task) if s.task in of.names else -1 for s in steps])
    barred = (torch.arange(len(of.names)) == own[:, None]) & (run.domain == "out")
    return experts.choose_adapters(
        run.mode, evolve(cfg.retrieve, k=run.k), queries, of.vectors, own=own, exclude=barred
    )


def answer_all(
    of: Experts, steps: Sequence[Step], found: Retrieved, mode: Mode, cfg: Config, path: Path
) -> list[Line]:
    """A line for each step: the answer, whether it is right, or why there is none (which counts as wrong); in the order of the steps.

    Lines are written batch by batch, so that whatever stops a later batch, the same call goes on behind the last one.

    Raises:
        ValueError: the file holds other lines (says where); no step at all could be answered.
    """
    batches = _batches(steps, cfg)
    kept, _ = progress.read_finished_lines(path, [row for batch in batches for row in batch])
    if unknown := [line["row"] for line in kept if not line.keys() >= _LINE]:
        raise ValueError(
            f"{path}, row {unknown[0]}: not a line of answers; remove the file to do it all again"
        )
    said = {line["row"]: line["answer"] for line in kept}

    def work(rows: Sequence[int]) -> list[Line]:
        talks = [_asked(steps, row, said, cfg) for row in rows]
        replies = _tried(of, talks, _of(found, rows), mode, cfg)
        said.update(
            {row: text for row, (text, _) in zip(rows, replies, strict=True)}
        )  # later turns of an episode build on these
        return [
            _line(steps[row], _shares_of(of, found, row), *reply, cfg)
            for row, reply in zip(rows, replies, strict=True)
        ]

    lines = sorted(
        progress.run_batches(path, batches, work, title=path.stem.rpartition("-")[0]),
        key=lambda line: line["row"],
    )
    if all("error" in line for line in lines):
        raise ValueError(
            f"{path.stem}: none of {len(lines)} questions could be answered; the first: {lines[0]['error']}"
        )
    return lines


def _batches(steps: Sequence[Step], cfg: Config) -> list[list[int]]:
    """Steps that are answered together; with its own history, all first turns before all second ones."""
    rounds = [list(range(len(steps)))]
    if cfg.evaluate.history == "own":
        rounds = [
            [i for i, s in enumerate(steps) if s.turn == turn]
            for turn in range(max(s.turn for s in steps) + 1)
        ]
    size = cfg.evaluate.batch
    return [rows[i : i + size] for rows in rounds for i in range(0, len(rows), size)]


def _line(step: Step, adapters: dict[str, float], text: str, error: str, cfg: Config) -> Line:
    same = answers.same_answer if cfg.evaluate.rule == "strict" else answers.same_by_tfidf
    line: Line = {"episode": step.episode, "task": step.task, "answer": text, "gold": step.gold}
    line |= {"right": not error and same(text, step.gold), "adapters": adapters}
    return line | {"error": error} if error else line


def _shares_of(of: Experts, found: Retrieved, row: int) -> dict[str, float]:
    """{adapter: weight} of a row."""
    pairs = zip(found.indices[row].tolist(), found.weights[row].tolist(), strict=True)
    return {of.names[i]: round(weight, 4) for i, weight in pairs if i >= 0}


def _asked(steps: Sequence[Step], i: int, said: dict[int, str], cfg: Config) -> Conversation:
    """The conversation before answer i, with the written answers of earlier turns or the model's own."""
    talk = steps[i].talk
    if cfg.evaluate.history == "given":
        return talk
    own = iter(
        [
            said[j]
            for j, s in enumerate(steps[:i])
            if s.episode == steps[i].episode and s.talk.line == talk.line
        ]
    )
    last = len(talk.messages) - 1
    return evolve(
        talk,
        messages=tuple(
            m | {"content": next(own)} if m["role"] == "assistant" and n < last else m
            for n, m in enumerate(talk.messages)
        ),
    )


def _tried(
    of: Experts, talks: Sequence[Conversation], found: Retrieved, mode: Mode, cfg: Config
) -> list[tuple[str, str]]:
    """(answer, error) of each; where a batch fails, its rows are tried one by one, so that only the faulty one is lost."""
    try:
        data = chat.encode_conversations(of.chat, talks, prompt=True)
        return [
            (text, "")
            for text in experts.answer_prompts(
                of, data, range(len(talks)), found, mode, cfg.evaluate.max_tokens
            )
        ]
    except (ValueError, FloatingPointError) as e:
        if len(talks) == 1:
            _log.warning("not answered, counts as wrong: %s", e)
            return [("", str(e))]
        return [_tried(of, [t], _of(found, [i]), mode, cfg)[0] for i, t in enumerate(talks)]


def _of(found: Retrieved, rows: Sequence[int]) -> Retrieved:
    rows = list(rows)
    return Retrieved(
        indices=found.indices[rows],
        similarity=found.similarity[rows],
        weights=found.weights[rows],
        abstained=found.abstained[rows],
    )


def stamp(cfg: Config, path: Path, steps: Sequence[Step]) -> str:
    """Eight hex digits of all that decides answers beside mode, domain and k: settings, questions, and the content of images, of the
    registry, its vectors, adapters and embedder; of a model in a folder, whose files are large, their sizes and times."""
    whole = hashlib.sha256()
    parts: list[Any] = [cfg.model, cfg.chat, cfg.base, cfg.retrieve, cfg.fusion, cfg.embed, cfg.retriever]
    parts += [
        (
            cfg.seed,
            cfg.evaluate.history,
            cfg.evaluate.per,
            cfg.evaluate.rule,
            cfg.evaluate.max_tokens,
            cfg.evaluate.batch,
        )
    ]
    whole.update(json.dumps([config.unstructure(p) for p in parts], sort_keys=True, default=str).encode())
    pictures = {
        p: files.file_digest(p)
        for p in track(sorted({p for s in steps for p in s.talk.images}), "reading images")
    }
    for s in steps:
        images = [(p.name, pictures[p]) for p in s.talk.images]
        whole.update(json.dumps([s.talk.messages, images, s.task, s.episode]).encode())
    held = registry.read_registry(path, cfg.pool.root)
    place = registry.registry_root(path, held)
    folders = [place / r.path for r in held.adapters] + ([place / held.embedder] if held.embedder else [])
    kept = [path, *(place / r.vector for r in held.adapters)]
    kept += [
        p
        for folder in folders
        for p in sorted(folder.iterdir())
        if p.suffix in (".safetensors", ".bin", ".json")
    ]
    for file in track(kept, "reading adapters"):
        whole.update(files.file_digest(file).encode())
    for file in (
        sorted(Path(cfg.model.name).iterdir()) if cfg.model.name and Path(cfg.model.name).is_dir() else ()
    ):
        whole.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return whole.hexdigest()[:8]
