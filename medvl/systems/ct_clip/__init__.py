"""ct_clip: CT volumes and reports in one space; findings named in words, never trained for, are read off by
comparison.
"""

from pathlib import Path

from medvl.systems.ct_clip import run
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
    folders=lambda cfg: (*drawn_data(cfg), Path(cfg.data.cache)),
)
