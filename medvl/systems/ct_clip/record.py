"""The record of a ct_clip experiment: what `system = "ct_clip"` in a TOML file may set."""

from typing import Any, Literal

from attrs import field, frozen

from medvl.base import config
from medvl.components import encode
from medvl.components.encode import EncodeConfig
from medvl.components.fuse import FuseConfig
from medvl.components.text import TextConfig
from medvl.ct.preprocess import CtConfig, size_of
from medvl.phantoms.chest_case import PhantomConfig
from medvl.training.record import TrainConfig, refuse_settings, refuse_stage_batches

SPLITS = ("train", "valid", "test")
_PER_SPLIT = ("folder", "split", "ct")  # what a file's pattern may hold in braces


@frozen(kw_only=True)
class DataConfig:
    """Where volumes, reports and labels are.

    In file names `{split}` stands for train, valid and test, `{folder}` for the folder, `{ct}` for a digest
    of the CT settings.
    """

    source: Literal["files", "phantoms"] = "files"
    folder: str = "data/ct_rate"
    phantoms: PhantomConfig = PhantomConfig(patients=1, seed=0)
    # Made by `invoke preprocess`; phantoms are preprocessed by the run itself.
    store: str = "{folder}/{split}.h5"
    # Of single splits: {test = "{folder}/valid.h5"} where two share a store.
    stores: dict[str, str] = field(factory=dict)
    reports: str = "{folder}/{split}_reports.csv"
    labels: str = "{folder}/{split}_labels.csv"
    metadata: str = "{folder}/{split}_metadata.csv"
    # Folder of another test set: test.h5, test_labels.csv and, where there are any, test_reports.csv and
    # test_metadata.csv. It is for evaluation.
    test: str = ""
    # Whose a volume is, where names are not CT-RATE's: a column of labels or metadata, or a regular
    # expression as "(P[0-9]+)_".
    patient_column: str = ""
    patient_pattern: str = ""
    # Both parts of a report joined, or ("either") one of the two drawn for each training step.
    text: Literal["findings", "impression", "both", "either"] = "both"
    impressions: float = 0.5  # of "either": how often it is the impression
    missing: Literal["error", "empty", "drop"] = "drop"  # reports without text
    # Show 1 to this many sentences of a report in a training step; 0 = all, in order.
    sentences: int = 0
    # Texts of a scan in a training step, each contrasted by itself; worth it where images cost more than
    # texts.
    draws: int = 1
    # The control that must learn nothing: give every training scan another scan's report.
    shuffle: bool = False
    cache: str = "cache"  # slice features of frozen encoders
    workers: int = 2

    def __attrs_post_init__(self) -> None:
        config.check_bounds(
            self,
            "data",
            impressions=config.SHARE,
            sentences=config.COUNT_OR_NONE,
            draws=(1, 1024),
            workers=config.PROCESSES,
        )
        config.check_patterns(
            self,
            "data",
            folder=(),
            test=(),
            cache=(),
            store=_PER_SPLIT,
            reports=_PER_SPLIT,
            labels=_PER_SPLIT,
            metadata=_PER_SPLIT,
        )
        # A plain dict, whose keys the structuring does not check.
        unknown = sorted(set(self.stores) - set(SPLITS))
        if unknown:
            raise ValueError(f"data.stores is for {', '.join(SPLITS)}, found {', '.join(unknown)}")
        for split, pattern in self.stores.items():
            config.fill_pattern(pattern, f"data.stores.{split}", **dict.fromkeys(_PER_SPLIT))
        if self.patient_pattern:
            config.check_regexes([self.patient_pattern], "data.patient_pattern")
        if self.patient_column and self.patient_pattern:
            raise ValueError("data: give patient_column or patient_pattern, not both")


@frozen(kw_only=True)
class VitConfig:
    """The slice encoder: a hub name, folder or .pth file; or, without a name, a Hugging Face config built
    from scratch.
    """

    name: str = ""
    config: dict[str, Any] = field(factory=dict)
    # Start from a patch embedding whitened over training slices; only for encoders built from scratch.
    whiten: bool = False


@frozen(kw_only=True)
class WordsConfig:
    """Tokenizer and text encoder; without names, byte-level BPE trained on the reports and CLIP's tower from
    scratch.
    """

    tokenizer: str = ""
    encoder: str = ""
    pool: Literal["first", "last", "mean"] = "first"  # of a named encoder
    # Its context, and for BPE its vocabulary, hold with a named encoder too.
    tower: TextConfig = TextConfig()


@frozen(kw_only=True)
class ContrastConfig:
    """What is compared, and how."""

    loss: Literal["clip", "siglip"] = "clip"
    # Of several processes: each compares all rows with all, or ("local") its own with all. The gradient is one.
    gather: Literal["global", "local"] = "global"
    dim: int = 512
    # Of a tower's rows, over the batch (running values when not training). Without `centre` all volumes start
    # nearly parallel; with `standardise` rare directions count as much as frequent ones.
    normalise: Literal["none", "centre", "standardise"] = "centre"
    scale: float = 1 / 0.07  # the logit scale at the start, CLIP's
    scale_max: float = 100.0
    bias: float = -10.0  # siglip only

    def __attrs_post_init__(self) -> None:
        config.check_bounds(
            self, "contrast", dim=config.WIDTH, scale=(1e-3, 1e6), scale_max=(1e-3, 1e6), bias=(-1e6, 1e6)
        )
        # After the first step the scale would jump down to its bound.
        if self.scale > self.scale_max:
            raise ValueError(
                f"contrast.scale must not be above contrast.scale_max, got {self.scale:g} and "
                f"{self.scale_max:g}"
            )


@frozen(kw_only=True)
class EvaluateConfig:
    """Zero-shot findings on the test split, thresholds from the validation split."""

    findings: tuple[str, ...] = ()  # () = all columns of the label table
    # The findings of published results, see `medvl.ct.protocols`; "ctclip" adds CT-CLIP's own metrics.
    protocol: Literal["", "ctrate18", "ctrate16", "radchest16", "ctclip"] = ""
    # "scan" has one score for all reconstructions of a scan, the mean of theirs.
    level: Literal["volume", "scan"] = "volume"
    exclude: str = ""  # text file of volumes that are not scored, one a line
    prompts: Literal["reference", "ctclip", "ensemble"] = "ensemble"
    rule: Literal["youden", "f1", "corner"] = "youden"
    # Of the probabilities, on the validation split: a scale and a bias for each finding, or one temperature.
    calibration: Literal["platt", "temperature", "none"] = "platt"
    bootstrap: int = 1000
    batch: int = 8
    # Write volume names, which may say who a patient is, below the scans of the report; else their row in the
    # scores.
    names: bool = False

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "evaluate", bootstrap=config.DRAWS, batch=(1, 2**20))
        if self.protocol and self.findings:
            raise ValueError("evaluate: give findings or a protocol, which has its own, not both")


# What a table `train` leaves out. The optimiser's numbers are CLIP's; the batch is what the loss contrasts.
_TRAINING = {
    "batch": 128,
    "chunk": 4,
    "checkpoint": False,
    "beta2": 0.98,
    "eps": 1e-6,
    "valid": 0,
    "stages": {"weight_decay": 0.2, "train": [".*"]},
}


def _check_training(_record: Any, _field: Any, cfg: TrainConfig) -> None:
    # Settings of TrainConfig that mean nothing here: taken silently they would look as if they worked.
    refuse_settings(cfg, "train", "ct_clip has encode.checkpoint instead; leave it out", checkpoint=False)
    refuse_settings(cfg, "train", "ct_clip is validated on all volumes; leave it out", valid=0)
    refuse_settings(
        cfg, "train", "is for language systems; leave it out", logits=256, tokens=0, added="float32"
    )
    for stage in cfg.stages:
        if stage.data:
            raise ValueError(f"stage {stage.name}: ct_clip has one kind of data, got data = {stage.data!r}")


@frozen(kw_only=True)
class Config:
    """A ct_clip experiment."""

    system: Literal["ct_clip"]
    about: str = ""
    seed: int = 0
    data: DataConfig = DataConfig()
    ct: CtConfig = CtConfig()
    vit: VitConfig = VitConfig()
    encode: EncodeConfig = EncodeConfig()
    fuse: FuseConfig = FuseConfig()
    words: WordsConfig = WordsConfig()
    contrast: ContrastConfig = ContrastConfig()
    train: TrainConfig = config.table(defaults=_TRAINING, check=_check_training)
    evaluate: EvaluateConfig = EvaluateConfig()

    def __attrs_post_init__(self) -> None:
        if bool(self.vit.name) == bool(self.vit.config):
            raise ValueError(
                "vit must have either a name (hub, folder or .pth) or a config to build from scratch"
            )
        config.check_bounds(self, "experiment", seed=config.SEED)
        refuse_stage_batches(self.train, "train")
        # With a name the patch size is known, and asked again, when the encoder is loaded.
        patch = self.vit.config.get("patch_size")
        if isinstance(patch, int) and patch > 0:
            encode.check_slice_size(self.encode, size_of(self.ct)[1:], patch)
        if self.vit.whiten and self.vit.name:
            raise ValueError(
                f"vit.whiten is for encoders built from scratch; the weights of {self.vit.name!r} would be "
                "lost"
            )
