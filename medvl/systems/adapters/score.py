"""The answers that adapters is scored by: every turn of the test conversations, in every mode and domain."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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
_WEIGHTS = (".safetensors", ".bin", ".json")  # files of an adapter or embedder that decide answers


@frozen(kw_only=True)
class Step:
    """One question: a turn of the assistant with all that stands before it."""

    conversation: Conversation  # ends with the written answer
    task: str
    category: str
    episode: str
    turn: int  # of the episode's conversation, from 0

    @property
    def gold(self) -> str:
        """The written answer."""
        return self.conversation.messages[-1]["content"]

    @property
    def query(self) -> tuple[str, tuple[Path, ...]]:
        """What adapters are found by: the question with its images, or those of earlier turns if it has none."""
        question, images = self.conversation.messages[-2]["content"], self.conversation.images
        count = question.count("<image>")
        # `images` are those of the whole conversation so far; the last ones belong to this question.
        return question, images[len(images) - count :] if count else images


@frozen(kw_only=True)
class Run:
    """One column of the table: a mode, in or out of domain, with k adapters."""

    mode: Mode
    domain: str
    k: int

    def name(self, cfg: Config) -> str:
        """As the table calls it."""
        return self.mode if self.k == cfg.retrieve.k else f"{self.mode} of {self.k}"


def steps_of(conversations: Sequence[Conversation], cfg: Config) -> list[Step]:
    """Every turn of the assistant as a step; conversations without an episode are one each."""
    steps, counts = list[Step](), Counter[str]()
    for conversation in conversations:
        task = str(conversation.extra["task"])
        counts[task] += 1
        # Whole conversations are left out, so that no turn lacks those before it.
        if cfg.evaluate.limit and counts[task] > cfg.evaluate.limit:
            continue
        name = conversation.extra.get("episode_id") or conversation.id or f"line {conversation.line}"
        category = str(conversation.extra.get(cfg.data.category, ""))
        roles = [message["role"] for message in conversation.messages]
        answers_at = [i for i, role in enumerate(roles) if role == "assistant"]
        for turn, i in enumerate(answers_at):
            step = Step(
                conversation=conversation.until(i + 1),
                task=task,
                category=category,
                # Two tasks may call different cases by one name.
                episode=f"{task}: {name}",
                turn=turn,
            )
            steps.append(step)
    return steps


def runs_of(cfg: Config) -> list[Run]:
    """The columns of the table; modes that know no domain are run once."""
    k, runs = cfg.retrieve.k, list[Run]()
    for mode in cfg.evaluate.modes:
        domains = cfg.evaluate.domains
        if mode in ("bare", "oracle"):
            domains = domains[:1]
        runs += [Run(mode=mode, domain=domain, k=k) for domain in domains]
    for domain in cfg.evaluate.domains:
        runs += [Run(mode="mixture", domain=domain, k=n) for n in cfg.evaluate.by_k if n != k]
    return runs


def embed_steps(pool: Experts, steps: Sequence[Step], cfg: Config) -> Tensor:
    """Embeddings of the steps, or of the first of their episodes, float32 [n, d].

    Nan where there is nothing to embed (it warns).
    """
    # The step whose question stands for each step's.
    sources = [*range(len(steps))]
    if cfg.evaluate.per == "episode":
        first = dict[str, int]()
        sources = [first.setdefault(step.episode, i) for i, step in enumerate(steps)]
    embedded = sorted({*sources})
    queries = [steps[i].query for i in embedded]
    vectors = experts.embed_questions(pool, [text for text, _ in queries], [images for _, images in queries])
    rows = {step: row for row, step in enumerate(embedded)}
    return vectors[[rows[i] for i in sources]]


def choose_for_steps(
    run: Run, pool: Experts, steps: Sequence[Step], queries: Tensor, cfg: Config
) -> Retrieved:
    """Which adapters each step gets; out of domain not its own."""
    numbers = {name: i for i, name in enumerate(pool.names)}
    # -1 for a task without an adapter: nothing is excluded for it, and the oracle has none.
    own = torch.tensor([numbers.get(step.task, -1) for step in steps])
    # [steps, adapters]; all False in domain.
    exclude = (torch.arange(len(pool.names)) == own[:, None]) & (run.domain == "out")
    settings = evolve(cfg.retrieve, k=run.k)
    return experts.choose_adapters(run.mode, settings, queries, pool.vectors, own=own, exclude=exclude)


# Answers ----------------------------------------------------------------------------------------------------
def answer_steps(
    pool: Experts, steps: Sequence[Step], retrieved: Retrieved, mode: Mode, cfg: Config, path: Path
) -> list[Line]:
    """A line for each step, in their order: the answer, whether it is right, or why there is none.

    What could not be answered counts as wrong. Lines are written batch by batch, so that whatever stops a
    later batch, the same call goes on behind the last one.

    Raises:
        ValueError: the file holds other lines (says where); no step at all could be answered.
    """
    batches = _batches(steps, cfg)
    kept, _ = progress.read_finished_lines(path, [row for rows in batches for row in rows])
    for line in kept:
        if not line.keys() >= _LINE:
            raise ValueError(
                f"{path}, row {line['row']}: not a line of answers; remove the file to start again"
            )
    texts: dict[int, str] = {line["row"]: line["answer"] for line in kept}

    def answer_batch(rows: Sequence[int]) -> list[Line]:
        questions = [_with_history(steps, row, texts, cfg) for row in rows]
        replies = _answer_or_error(pool, questions, _select_rows(retrieved, rows), mode, cfg)
        for row, (text, _) in zip(rows, replies, strict=True):
            texts[row] = text  # later turns of an episode build on it
        lines = []
        for row, (text, error) in zip(rows, replies, strict=True):
            lines.append(_line(steps[row], _adapter_weights(pool, retrieved, row), text, error, cfg))
        return lines

    # MODE-DOMAIN-K-STAMP without the stamp.
    title = path.stem.rpartition("-")[0]
    lines = progress.run_batches(path, batches, answer_batch, title=title)
    # Accuracies of 0 for every task would look like a result.
    if all("error" in line for line in lines):
        raise ValueError(
            f"{path.stem}: none of {len(lines)} questions could be answered; the first: "
            f"{_in_order(lines)[0]['error']}"
        )
    return _in_order(lines)


# With the model's own history the file holds all first turns, then all second ones.
def _in_order(lines: Sequence[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: line["row"])


def _batches(steps: Sequence[Step], cfg: Config) -> list[list[int]]:
    """Steps that are answered together; with its own history, all first turns before all second ones."""
    rounds = [[*range(len(steps))]]
    if cfg.evaluate.history == "own":
        turns = max(step.turn for step in steps) + 1
        rounds = [[i for i, step in enumerate(steps) if step.turn == turn] for turn in range(turns)]
    size, batches = cfg.evaluate.batch, list[list[int]]()
    for rows in rounds:
        batches += [rows[start : start + size] for start in range(0, len(rows), size)]
    return batches


def _line(step: Step, adapters: dict[str, float], text: str, error: str, cfg: Config) -> Line:
    same = answers.same_answer if cfg.evaluate.rule == "strict" else answers.same_by_tfidf
    line: Line = {
        "episode": step.episode,
        "task": step.task,
        "answer": text,
        "gold": step.gold,
        "right": not error and same(text, step.gold),
        "adapters": adapters,
    }
    if error:
        line["error"] = error
    return line


def _adapter_weights(pool: Experts, retrieved: Retrieved, row: int) -> dict[str, float]:
    """{adapter: weight} of a row."""
    indices, weights = retrieved.indices[row].tolist(), retrieved.weights[row].tolist()
    pairs = zip(indices, weights, strict=True)
    # -1 fills the places of a row that got fewer than k adapters.
    return {pool.names[i]: round(weight, 4) for i, weight in pairs if i >= 0}


def _with_history(steps: Sequence[Step], row: int, texts: dict[int, str], cfg: Config) -> Conversation:
    """The conversation before an answer, with the written answers of earlier turns or the model's own.

    Args:
        texts: {step: answer} of the steps that are answered.
    """
    step, conversation = steps[row], steps[row].conversation
    if cfg.evaluate.history == "given":
        return conversation
    earlier = []
    for i, other in enumerate(steps[:row]):
        # An episode may have several conversations; only turns of this one stand before the answer.
        if other.episode == step.episode and other.conversation.line == conversation.line:
            earlier.append(texts[i])
    *before, last = conversation.messages
    messages, own = list[dict[str, str]](), iter(earlier)
    for message in before:
        if message["role"] == "assistant":
            message = message | {"content": next(own)}
        messages.append(message)
    return evolve(conversation, messages=(*messages, last))


def _answer_or_error(
    pool: Experts, questions: Sequence[Conversation], retrieved: Retrieved, mode: Mode, cfg: Config
) -> list[tuple[str, str]]:
    """(answer, error) of each question, one of them "".

    Where a batch fails, its rows are tried one by one, so that only the faulty one is lost.
    """
    try:
        data = chat.encode_conversations(pool.chat, questions, prompt=True)
        rows, max_tokens = range(len(questions)), cfg.evaluate.max_tokens
        texts = experts.answer_prompts(pool, data, rows, retrieved, mode, max_tokens)
        return [(text, "") for text in texts]
    # Only what a faulty sample raises: out of memory, or a mistake in the code, must stop the run.
    except (ValueError, FloatingPointError) as e:
        if len(questions) == 1:
            _log.warning("not answered, counts as wrong: %s", e)
            return [("", str(e))]
    replies = []
    for row, question in enumerate(questions):
        replies += _answer_or_error(pool, [question], _select_rows(retrieved, [row]), mode, cfg)
    return replies


def _select_rows(retrieved: Retrieved, rows: Sequence[int]) -> Retrieved:
    rows = list(rows)
    return Retrieved(
        indices=retrieved.indices[rows],
        similarity=retrieved.similarity[rows],
        weights=retrieved.weights[rows],
        abstained=retrieved.abstained[rows],
    )


def stamp_answers(cfg: Config, path: Path, steps: Sequence[Step]) -> str:
    """Eight hex digits of all that decides answers beside mode, domain and k.

    These are settings, questions, and the content of images, of the registry, its vectors, adapters and
    embedder; of a model in a folder, whose files are large, their sizes and times.
    """
    content = hashlib.sha256()
    evaluate = cfg.evaluate
    # Of evaluate only what changes an answer or whether it is right: other intervals need no new answers.
    how = (cfg.seed, evaluate.history, evaluate.per, evaluate.rule, evaluate.max_tokens, evaluate.batch)
    settings = [cfg.model, cfg.chat, cfg.base, cfg.retrieve, cfg.fusion, cfg.embed, cfg.retriever, how]
    plain = [config.unstructure(part) for part in settings]
    content.update(json.dumps(plain, sort_keys=True, default=str).encode())
    images = sorted({image for step in steps for image in step.conversation.images})
    digests = {image: files.file_digest(image) for image in track(images, "reading images")}
    for step in steps:
        shown = [(image.name, digests[image]) for image in step.conversation.images]
        question = [step.conversation.messages, shown, step.task, step.episode]
        content.update(json.dumps(question).encode())
    for file in track(_registry_files(path, cfg.pool.root), "reading adapters"):
        content.update(files.file_digest(file).encode())
    if cfg.model.name and Path(cfg.model.name).is_dir():
        for file in sorted(Path(cfg.model.name).iterdir()):
            # The files of a model are gigabytes, too many to hash before every evaluation.
            stat = file.stat()
            content.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return content.hexdigest()[:8]


def _registry_files(path: Path, root: str) -> list[Path]:
    """The registry, its vectors, and the files of its adapters and its embedder."""
    pool = registry.read_registry(path, root)
    home = registry.registry_root(path, pool)
    folders = [home / adapter.path for adapter in pool.adapters]
    if pool.embedder:
        folders.append(home / pool.embedder)
    paths = [path, *(home / adapter.vector for adapter in pool.adapters)]
    for folder in folders:
        paths += [file for file in sorted(folder.iterdir()) if file.suffix in _WEIGHTS]
    return paths
