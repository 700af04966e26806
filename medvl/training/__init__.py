"""Training: gradients, the loop that survives a kill, stages, optimisers, and the memory they take.

`record` what is trained, how long and how fast; `stages` train the stages of a record; `gradients` value
and gradient of a loss, exact for large batches; `loop` steps with validation, checkpoints and a journal;
`states` what a step changes, written and read; `optim` and `muon` optimisers as pairs of functions;
`order` which samples make up a batch; `journal` the lines of a run; `interrupt` signals; `estimate` the
memory of a step before there is any; `trace` its FLOPs, kernels and seconds; `determinism` the same bits
from a GPU.
"""
