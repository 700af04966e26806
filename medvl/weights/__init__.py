"""A weight is a value: what quantises, adapts, mixes or shards weights is a function from params to params.

`lazy` has weights that are no plain tensors and act in a forward pass like any, `lora` adapters (LoRA and
H-LoRA), `extended` token tables with trained rows behind frozen ones, `compose` mixtures and fusions of several
adapters, `four_bit` NF4 and FP4 by the kernels of bitsandbytes, `int4` four-bit whole numbers with a scale for every group,
`shards` parameters in parts on several processes, `rounding` parameters and moments in 16 or 8 bits.
"""
