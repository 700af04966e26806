"""document: a vision-language model that reads medical pages into fields; adapted as in tune, scored by fields."""

from typing import Any, Literal

from attrs import evolve, frozen

from medvl.base import config
from medvl.documents.source_record import SourcesConfig
from medvl.language.chat import ChatConfig, ModelConfig
from medvl.phantoms.pages import PageConfig
from medvl.systems.tune import record as tune
from medvl.training.record import TrainConfig, language_training
from medvl.weights.lora import LoraConfig

# The layout of pages of notes was a setting once; it is fixed now, as the default was.
_PAGE = {"width": 850, "height": 1100, "margin": 60, "font": "DejaVuSans", "font_size": 16, "line_height": 21}


def upgrade_sources(table: dict[str, Any]) -> dict[str, Any]:
    """Public data sets as records of 2026-11-27 have them, in the present spelling. Another layout stays an error."""
    if table.get("page") == _PAGE:
        return {key: value for key, value in table.items() if key != "page"}
    return table


@frozen(kw_only=True)
class DataConfig:
    """Conversations about pages; `{split}` stands for train, valid and test, `{folder}` for the folder.

    A line may have "fields", what its page says as `documents.fields` writes it; else they are read from the written
    answer. "document" groups the pages of one document, "damage" names what happened to a page.
    """

    source: Literal["files", "pages", "public"] = "files"
    folder: str = "data/documents"
    pages: PageConfig = PageConfig()  # what is drawn
    # Fetched into `folder`; it has no other folder.
    public: SourcesConfig = config.table(SourcesConfig(), upgrade=upgrade_sources)
    conversations: str = "{folder}/{split}.jsonl"
    root: str = ""  # where relative image names start; "" = the folder of the JSONL

    def __attrs_post_init__(self) -> None:
        config.check_patterns(self, "data", folder=(), root=(), conversations=("folder", "split"))

    @property
    def drawn(self) -> PageConfig | None:
        """What is drawn, None where files are read."""
        return self.pages if self.source == "pages" else None

    @property
    def fetched(self) -> SourcesConfig:
        """The public data sets, with the folder that they are fetched into."""
        return evolve(self.public, folder=self.folder)


@frozen(kw_only=True)
class EvaluateConfig(tune.EvaluateConfig):
    """As of tune, with answers as long as a page."""

    max_tokens: int = 1024
    rules: int = 0  # test pages that OCR and rules read, too, as a baseline; needs medvl[ocr], 3 s a page

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        config.check_bounds(self, "evaluate", rules=config.COUNT_OR_NONE)


@frozen(kw_only=True)
class Config:
    """A document experiment."""

    system: Literal["document"]
    about: str = ""
    seed: int = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    chat: ChatConfig = ChatConfig()  # pages are never cut: what is above its context is left out and counted
    # The language model's layers alone: ends of names such as "up_proj" would also match the vision tower's.
    lora: LoraConfig = config.subrecord(LoraConfig(pattern="all-linear"))
    train: TrainConfig = language_training()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __attrs_post_init__(self) -> None:
        tune.check_tuning(self)
