"""The parts that models are composed of, each a record and pure functions `f(cfg, params, tensors)`.

`encode` turns CT slices into embeddings, `fuse` those of a volume into one, `compress` (with its sums in
`slots`) the patches of a slide into a few tokens, `project` tokens to the width of a language model, `text`
token ids into one embedding, `vq` images into codes and codes into images; `layers` has transformer blocks, `losses` the contrastive losses and the
next-token loss.
"""
