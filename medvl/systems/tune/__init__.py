"""tune: a language or vision-language model trained on conversations, whole or by LoRA, scored by its
answers.

`record` is the record of an experiment, `run` its data, training and report, `ask` one question to a run,
`variants` the forms of its model.
"""

from medvl.systems.system import System
from medvl.systems.tune import run
from medvl.systems.tune.ask import ask
from medvl.systems.tune.record import Config
from medvl.systems.tune.variants import bench_questions, calibration, find_variant

SYSTEM = System(
    record=Config,
    prepare=run.prepare,
    fit=run.fit,
    load=run.load,
    assess=run.assess,
    labels=run.labels,
    memory=run.memory,
    ask=ask,
    variant=find_variant,
    bench_questions=bench_questions,
    calibration=calibration,
    compare=run.compare_answers,
    takes=("--image",),
)
