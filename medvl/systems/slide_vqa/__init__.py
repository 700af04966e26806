"""slide_vqa: questions about whole slides of any number of patches, through a few tokens of each.

`record` is the record of an experiment, `data` its files, `pretrain` trains the compressor and `tokens` are
what it makes of the slides of a run; `model` is the language model that sees them. `run` trains, `assess`
scores and reports, `look` is one slide and the map of its answer, `ask` one question to a run.
"""

from medvl.systems.slide_vqa import run
from medvl.systems.slide_vqa.ask import ask
from medvl.systems.slide_vqa.assess import assess
from medvl.systems.slide_vqa.record import Config
from medvl.systems.system import System

SYSTEM = System(
    record=Config,
    prepare=run.prepare,
    fit=run.fit,
    load=run.load,
    assess=assess,
    labels=run.labels,
    memory=run.memory,
    ask=ask,
    takes=("--slide", "--offset"),
)
