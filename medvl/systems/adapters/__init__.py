"""adapters: one model and many adapters; each question gets those whose training samples are most like it.

`record` is the record of an experiment, `data` its conversations, `run` trains the base model and an adapter
for each task and makes the registry, `score` answers the test questions in every mode, `tables` makes numbers
and the report of these, `ask` is one question to a run or a registry.
"""

from medvl.systems.adapters import data, run
from medvl.systems.adapters.ask import ask
from medvl.systems.adapters.record import Config
from medvl.systems.system import System

SYSTEM = System(
    record=Config,
    prepare=data.prepare,
    fit=run.fit,
    load=run.load,
    assess=run.assess,
    labels=run.labels,
    memory=run.memory,
    ask=ask,
    takes=("--image", "--mode", "-k", "--own", "--set"),
    trains=lambda cfg: cfg.trained,
    # As ms-swift (MAX_PIXELS) and LoraRetriever (MAX_NUM) read them: what their scripts set means the same.
    environment={"MAX_PIXELS": "chat.max_pixels", "MAX_NUM": "chat.max_images"},
)
