"""ct_clip: CT volumes and reports in one space; findings named in words are read off by comparison.

`record` is the record of an experiment, `model` the two towers and their loss, `data` its files, labels,
reports and batches, `slice_features` the cache of a frozen slice encoder, `common_space` places volumes and texts
where findings are read off, `run` trains, `score` scores a split and writes the report, `slice_effects` tells which
slices speak for a finding, `look` is one scan and `scan_page` its page, `export` writes a run as safetensors.
"""

from pathlib import Path

from medvl.systems.ct_clip import export, run
from medvl.systems.ct_clip.data import prepare_data
from medvl.systems.ct_clip.record import Config
from medvl.systems.ct_clip.score import assess
from medvl.systems.system import System, drawn_data

SYSTEM = System(
    record=Config,
    prepare=prepare_data,
    fit=run.fit,
    load=run.load,
    assess=assess,
    memory=run.memory,
    export=export.export,
    # Slice features of frozen encoders are written into the cache.
    folders=lambda cfg: (*drawn_data(cfg), Path(cfg.data.cache)),
)
