"""Records of the public data sets that a document model trains on, and their licences."""

from typing import Literal

from attrs import field, frozen

from medvl.base import config, files
from medvl.base.text import few

# Licences of data sets of the hub as their pages state them, and whether commercial use is not granted.
LICENCES = {
    "mdwiratathya/ROCO-radiology": ("not stated", True),
    "eltorio/ROCO-radiology": ("mit (claimed; the images are from PubMed Central)", False),
    "eltorio/ROCOv2-radiology": ("cc-by-nc-sa-4.0", True),
    "unsloth/Radiology_mini": ("cc-by-nc-2.0", True),
    "FreedomIntelligence/PubMedVision": ("apache-2.0", False),
    "mtybilly/PubMedVision-Alignment-VQA": ("apache-2.0", False),
    "harishnair04/mtsamples": ("apache-2.0", False),
    "smoh/medical-transcriptions": ("mit", False),
}


@frozen(kw_only=True)
class Source:
    """A data set: where its rows come from, and under which licence.

    "captions" are images with a caption each (ROCO), "conversations" images with questions and answers
    (PubMedVision), "notes" texts (MTSamples), which are drawn onto pages to be transcribed.
    """

    name: str
    kind: Literal["captions", "conversations", "notes"]
    path: str  # of the hub or of local files, as `source_rows.read_rows` takes it
    alternatives: tuple[str, ...] = ()  # further paths, tried in this order where one fails
    split: str = "train"  # of a data set of the hub
    images: str = ""  # folder where relative names of images start; "" = that of the local file
    limit: int = 0  # rows that are used at most; 0 = all
    licence: str = ""  # "" = that of `LICENCES`, or not stated
    non_commercial: bool = False  # whether `licence` forbids commercial use

    def __attrs_post_init__(self) -> None:
        files.check_name(self.name, "source")
        config.check_bounds(self, f"source {self.name}", limit=config.COUNT_OR_NONE)

    def licence_of(self, path: str) -> tuple[str, bool]:
        """(licence, whether commercial use is not granted) of one of its paths."""
        if self.licence:
            return self.licence, self.non_commercial
        # What no licence grants is not allowed.
        return LICENCES.get(path.partition(":")[0], ("not stated", True))


def public_sources() -> tuple[Source, ...]:
    """ROCO, PubMedVision (alignment) and MTSamples on the hub."""
    return (
        Source(
            name="roco",
            kind="captions",
            path="eltorio/ROCO-radiology",
            alternatives=("mdwiratathya/ROCO-radiology", "unsloth/Radiology_mini"),
            limit=3000,
        ),
        Source(
            name="pubmedvision",
            kind="conversations",
            path="mtybilly/PubMedVision-Alignment-VQA",
            # Its rows only name images, which are in zip files beside them: unpack one and set `images`.
            alternatives=("FreedomIntelligence/PubMedVision:PubMedVision_Alignment_VQA",),
            limit=2000,
        ),
        Source(
            name="mtsamples",
            kind="notes",
            path="harishnair04/mtsamples",
            alternatives=("smoh/medical-transcriptions",),
        ),
    )


@frozen(kw_only=True)
class SourcesConfig:
    """Data sets, and how conversations are made of them."""

    folder: str = "data/documents"
    sources: tuple[Source, ...] = field(factory=public_sources)
    shortest: int = 50  # characters of an answer
    valid: float = 0.1  # share of the conversations
    test: float = 0.1
    seed: int = 42

    def __attrs_post_init__(self) -> None:
        config.check_patterns(self, "data", folder=())
        config.check_bounds(self, "data", shortest=config.COUNT_OR_NONE, seed=config.SEED)
        config.check_bounds(self, "data", valid=config.SHARE, test=config.SHARE)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"data.sources: must be one or more of different names, got {few(names)}")
        if self.valid + self.test >= 1:
            raise ValueError(
                f"data: valid and test must leave a share for training, got {self.valid} and {self.test}"
            )
