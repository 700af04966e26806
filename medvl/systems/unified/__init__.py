"""unified: one model that understands images and draws them, each through a plugin on one base.

`record` is the record of an experiment, `codes` trains the VQ model and computes the codes of target pictures;
`model` is base, tower and plugins as one model, `ask` and `draw` are its answers and pictures. `probe` tells
what a drawn head shows.
"""
