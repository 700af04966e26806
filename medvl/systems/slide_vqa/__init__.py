"""slide_vqa: questions about whole slides of any number of patches, through a few tokens of each.

`model` is the record of an experiment and the model, `pretrain` trains the compressor that makes the tokens,
`run` is data, training and report, `look` one slide and the map of its answer, `ask` one question to a run.
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
