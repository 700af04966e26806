"""Systems that are trained, evaluated and asked: one folder each, found by the name in an experiment's TOML.

`system` says what a folder offers, the record `SYSTEM`; `run` trains and evaluates any system from a record;
`memory` refuses what cannot fit a GPU. The folders are `ct_clip`, `tune`, `slide_vqa` and `adapters`. In a
folder `record` is the record of an experiment, `run` trains it and reads a trained run.
"""
