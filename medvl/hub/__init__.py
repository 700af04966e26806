"""Model files in and out; the only package that imports transformers.

`loading` reads checkpoints as a skeleton and params, `saving` writes them, `skeletons` builds
architectures without weights or with random ones and calls them, `architectures` checks a config,
`vision_attention` makes Qwen-VL's windows one call of attention, `weight_names` maps the names of published
checkpoints, `kv_cache` lets a model's cache grow in place. `checkpoints` finds and reads the files, `dinov2`
and `clip` know the original names of both, `int4_files` reads and writes four-bit whole numbers, `tokens` gives tokenizers and image processors, `peft_files` (with
`peft_config`) and `hlora_files` read and write adapters, `plugin_files` those of HealthGPT with all that belongs
to them, `vqgan_files` the VQ models that turn images into codes.
"""
