"""unified: one model that understands images and draws them, each through a plugin on one base.

`record` is the record of an experiment, `codes` trains the VQ model and computes the codes of target pictures;
`model` is base, tower and plugins as one model, `ask` and `draw` are its answers and pictures. `data` reads what it
is trained and tested on, `run` trains, and `score` scores; `probe` tells what a drawn head shows.
"""

from medvl.systems.system import System
from medvl.systems.unified import data, run
from medvl.systems.unified.record import Config

SYSTEM = System(
    record=Config,
    prepare=data.prepare,
    fit=run.fit,
    load=run.load,
    assess=run.assess,
    labels=run.labels,
    memory=run.memory,
    ask=run.ask,
    takes=("--image", "--page", "--window"),
)
