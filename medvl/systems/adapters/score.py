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
        question = self.conversation.messages[-2]["content"]
        images = self.conversation.images  # of the whole conversation so far
        count = question.count("<image>")
        if count:
            # The last ones belong to this question.
            images = images[len(images) - count :]
        return question, images


@frozen(kw_only=True)
class Run:
    """One column of the table: a mode, in or out of domain, with k adapters."""

    mode: Mode
    domain: str
    k: int

    def name(self, cfg: Config) -> str:
        """As the table calls it."""
        if self.k == cfg.retrieve.k:
            return self.mode
        return f"{self.mode} of {self.k}"


def steps_of(conversations: Sequence[Conversation], cfg: Config) -> list[Step]:
    """Every turn of the assistant as a step; conversations without an episode are one each."""
    steps = list[Step]()
    counts = Counter[str]()
    for conversation in conversations:
        task = str(conversation.extra["task"])
        counts[task] += 1
        # Whole conversations are left out, so that no turn lacks those before it.
        if cfg.evaluate.limit and counts[task] > cfg.evaluate.limit:
            continue
        name = conversation.extra.get("episode_id") or conversation.id or f"line {conversation.line}"
        category = str(conversation.extra.get(cfg.data.category, ""))
        turn = 0
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            step = Step(
                conversation=conversation.until(i + 1),
                task=task,
                category=category,
                # Two tasks may call different cases by one name.
                episode=f"{task}: {name}",
                turn=turn,
            )
            steps.append(step)
            turn += 1
    return steps


def runs_of(cfg: Config) -> list[Run]:
    """The columns of the table; modes that know no domain are run once."""
    runs = list[Run]()
    for mode in cfg.evaluate.modes:
        domains = cfg.evaluate.domains
        if mode in ("bare", "oracle"):
            domains = domains[:1]
        for domain in domains:
            runs.append(Run(mode=mode, domain=domain, k=cfg.retrieve.k))
    for domain in cfg.evaluate.domains:
        for k in cfg.evaluate.by_k:
            if k != cfg.retrieve.k:
                runs.append(Run(mode="mixture", domain=domain, k=k))
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
    # Each question is embedded once.
    embedded = sorted({*sources})
    texts = []
    images = []
    for i in embedded:
        question, pictures = steps[i].query
        texts.append(question)
        images.append(pictures)
    vectors = experts.embed_questions(pool, texts, images)
    row_of_step = {step: row for row, step in enumerate(embedded)}
    rows = [row_of_step[step] for step in sources]
    return vectors[rows]


def choose_for_steps(
    run: Run, pool: Experts, steps: Sequence[Step], queries: Tensor, cfg: Config
) -> Retrieved:
    """Which adapters each step gets; out of domain not its own."""
    numbers = {name: i for i, name in enumerate(pool.names)}
    # -1 for a task without an adapter: nothing is excluded for it, and the oracle has none.
    own = torch.tensor([numbers.get(step.task, -1) for step in steps])
    is_own = torch.arange(len(pool.names)) == own[:, None]  # [steps, adapters]
    # All False in domain.
    exclude = is_own & (run.domain == "out")
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
    all_rows = [row for rows in batches for row in rows]
    finished, _ = progress.read_finished_lines(path, all_rows)
    texts = dict[int, str]()
    for line in finished:
        if not line.keys() >= _LINE:
            raise ValueError(
                f"{path}, row {line['row']}: not a line of answers; remove the file to start again"
            )
        texts[line["row"]] = line["answer"]

    def answer_batch(rows: Sequence[int]) -> list[Line]:
        questions = [_with_history(steps, row, texts, cfg) for row in rows]
        replies = _answer_or_error(pool, questions, _select_rows(retrieved, rows), mode, cfg)
        lines = []
        for row, (text, error) in zip(rows, replies, strict=True):
            texts[row] = text  # later turns of an episode build on it
            adapters = _adapter_weights(pool, retrieved, row)
            lines.append(_line(steps[row], adapters, text, error, cfg))
        return lines

    # MODE-DOMAIN-K-STAMP without the stamp.
    title = path.stem.rpartition("-")[0]
    lines = progress.run_batches(path, batches, answer_batch, title=title)
    # With the model's own history the file holds all first turns, then all second ones.
    lines = sorted(lines, key=lambda line: line["row"])
    # Accuracies of 0 for every task would look like a result.
    if all("error" in line for line in lines):
        raise ValueError(
            f"{path.stem}: none of {len(lines)} questions could be answered; the first: {lines[0]['error']}"
        )
    return lines


def _batches(steps: Sequence[Step], cfg: Config) -> list[list[int]]:
    """Steps that are answered together; with its own history, all first turns before all second ones."""
    rounds = [[*range(len(steps))]]
    if cfg.evaluate.history == "own":
        turns = max(step.turn for step in steps) + 1
        rounds = [list[int]() for _ in range(turns)]
        for i, step in enumerate(steps):
            rounds[step.turn].append(i)
    size = cfg.evaluate.batch
    batches = list[list[int]]()
    for rows in rounds:
        for start in range(0, len(rows), size):
            batches.append(rows[start : start + size])
    return batches


def _line(step: Step, adapters: dict[str, float], text: str, error: str, cfg: Config) -> Line:
    same = answers.same_answer if cfg.evaluate.rule == "strict" else answers.same_by_tfidf
    is_right = not error and same(text, step.gold)
    line: Line = {
        "episode": step.episode,
        "task": step.task,
        "answer": text,
        "gold": step.gold,
        "right": is_right,
        "adapters": adapters,
    }
    if error:
        line["error"] = error
    return line


def _adapter_weights(pool: Experts, retrieved: Retrieved, row: int) -> dict[str, float]:
    """{adapter: weight} of a row."""
    indices = retrieved.indices[row].tolist()
    weights = retrieved.weights[row].tolist()
    weight_of = dict[str, float]()
    for i, weight in zip(indices, weights, strict=True):
        # -1 fills the places of a row that got fewer than k adapters.
        if i >= 0:
            weight_of[pool.names[i]] = round(weight, 4)
    return weight_of


def _with_history(steps: Sequence[Step], row: int, texts: dict[int, str], cfg: Config) -> Conversation:
    """The conversation before an answer, with the written answers of earlier turns or the model's own.

    Args:
        texts: {step: answer} of the steps that are answered.
    """
    step = steps[row]
    conversation = step.conversation
    if cfg.evaluate.history == "given":
        return conversation
    earlier_answers = []
    for i, earlier in enumerate(steps[:row]):
        # An episode may have several conversations; only turns of this one stand before the answer.
        same_episode = earlier.episode == step.episode
        if same_episode and earlier.conversation.line == conversation.line:
            earlier_answers.append(texts[i])
    own_answers = iter(earlier_answers)
    *before, last = conversation.messages
    messages = list[dict[str, str]]()
    for message in before:
        if message["role"] == "assistant":
            message = message | {"content": next(own_answers)}
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
        rows = range(len(questions))
        texts = experts.answer_prompts(pool, data, rows, retrieved, mode, cfg.evaluate.max_tokens)
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
    content.update(_settings_text(cfg).encode())

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


def _settings_text(cfg: Config) -> str:
    """The settings that decide answers, as JSON."""
    evaluate = cfg.evaluate
    # Of evaluate only what changes an answer or whether it is right: other intervals need no new answers.
    evaluation = (
        cfg.seed,
        evaluate.history,
        evaluate.per,
        evaluate.rule,
        evaluate.max_tokens,
        evaluate.batch,
    )
    # The order is part of the stamp.
    settings = [
        cfg.model,
        cfg.chat,
        cfg.base,
        cfg.retrieve,
        cfg.fusion,
        cfg.embed,
        cfg.retriever,
        evaluation,
    ]
    plain = [config.unstructure(part) for part in settings]
    return json.dumps(plain, sort_keys=True, default=str)


def _registry_files(path: Path, root: str) -> list[Path]:
    """The registry, its vectors, and the files of its adapters and its embedder."""
    pool = registry.read_registry(path, root)
    home = registry.registry_root(path, pool)
    paths = [path]
    folders = []
    for adapter in pool.adapters:
        paths.append(home / adapter.vector)
        folders.append(home / adapter.path)
    if pool.embedder:
        folders.append(home / pool.embedder)
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.suffix in _WEIGHTS:
                paths.append(file)
    return paths
