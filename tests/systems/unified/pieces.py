"""A tiny base, tower and VQ model in files, and random plugins for them."""

import torch
from attrs import evolve
from torch import Generator

from medvl.base.tree import map_leaves
from medvl.components.project import ProjectConfig, init_project
from medvl.components.vq import VqConfig, init_vq
from medvl.hub import plugin_files, saving, skeletons, tokens, vqgan_files
from medvl.language.chat import _SPECIAL_TOKENS
from medvl.language.templates import TEMPLATES
from medvl.weights.lora import LoraConfig, init_lora
from tests.tiny import CONFIGS

TEXTS = [
    "Which organ is shown? The liver.",
    "Is there a mass? Yes, on the left. No.",
    "Reconstruct the image.",
]
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
VQ = VqConfig(
    n_embed=64,
    embed_dim=32,
    z_channels=32,
    resolution=8,
    ch=32,
    ch_mult=(1, 1),
    num_res_blocks=1,
    attn_resolutions=(),
)
PHI3 = CONFIGS["phi3"] | {"max_position_embeddings": 2048, "sliding_window": 2047}


def make_files(folder, *, vq=VQ, seed=0):
    """Write base, tower and vq below a folder."""
    gen = Generator().manual_seed(seed)
    tok = tokens.train_bpe(TEXTS, 300, lower=False)
    tok.add_special_tokens({"additional_special_tokens": [*_SPECIAL_TOKENS]})
    tok.chat_template = TEMPLATES["chatml"]
    # As Phi-3: rows behind those of the tokenizer, which no token has.
    skeleton, params = skeletons.init_skeleton(PHI3 | {"vocab_size": len(tok) + 5}, gen, head="language")
    params = map_leaves(lambda t: t * (5 if t.dim() > 1 else 1), params)
    saving.save_skeleton(skeleton, params, folder / "base")
    tok.save_pretrained(folder / "base")
    saving.save_skeleton(*skeletons.init_skeleton(CLIP, gen), folder / "tower")
    vqgan_files.write_vqgan(vq, init_vq(vq, gen), folder / "vq")
    return folder


def make_plugin(folder, task, *, seed=1, rank=8, rows=True, codes=VQ.n_embed):
    """A random plugin for the base of a folder, whose adapter changes what the base computes."""
    gen = Generator().manual_seed(seed)
    skeleton = skeletons.empty_skeleton(
        plugin_files.read_json(folder / "base" / "config.json"), head="language"
    )
    tok = tokens.tokenizer(folder / "base")
    lora = LoraConfig(rank=rank, alpha=2.0 * rank, experts=4, pattern="all-linear")
    adapter = init_lora(lora, skeleton, gen)
    factors = map_leaves(lambda t: t + 0.05 * torch.randn(t.shape, generator=gen), adapter.factors)
    config = plugin_files.PluginConfig(
        task=task,
        level={"understand": -2, "draw": 1}[task],
        rank=rank,
        alpha=2.0 * rank,
        base=str(folder / "base"),
        template="chatml",
        tokens=len(tok),
        codes=codes,
        bos=tok("a")["input_ids"][:1] == [tok.bos_token_id],
    )
    width = PHI3["hidden_size"]
    table = {part: torch.randn(config.added, width, generator=gen) for part in ("embed", "head")}
    return plugin_files.Plugin(
        config=config,
        projector=init_project(ProjectConfig(inputs=CLIP["hidden_size"], hidden=width, outputs=width), gen),
        adapter=evolve(adapter, factors=factors),
        rows=table if rows else None,
    )
