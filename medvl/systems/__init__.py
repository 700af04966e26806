"""Systems that are trained, evaluated and asked: one folder each, found by the name in an experiment's TOML.

`system` says what a folder offers, the record `SYSTEM`; `run` trains and evaluates any system from a record;
`memory` refuses what cannot fit a GPU; `bench` measures variants of a run's model, `quantize` makes one of four bits, and `export` writes it for
other programs with a model `card`; `gates` and `pipeline_report` say what the files of a pipeline must hold, and
what follows from them. The folders are `ct_clip`, `tune`, `slide_vqa`, `adapters`, `unified` and
`document`. In a
folder `record` is the record of an experiment, `run` trains it and reads a trained run.
"""
