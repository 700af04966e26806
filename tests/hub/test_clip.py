"""clip: checkpoints of OpenAI and open_clip, against their networks written down plainly and transformers' own."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from medvl.components import encode
from medvl.components.text import encode_text_with
from medvl.hub import clip, loading

OUTER = {
    "visual.class_embedding": (128,),
    "visual.positional_embedding": (17, 128),
    "visual.conv1.weight": (128, 3, 8, 8),
    "visual.proj": (128, 48),
    "token_embedding.weight": (90, 64),
    "positional_embedding": (12, 64),
    "text_projection": (64, 48),
    "logit_scale": (),
}
NORMS = {"visual.ln_pre": 128, "visual.ln_post": 128, "ln_final": 64}


def original():
    """A random state dict with the names and shapes of clip/model.py: a ViT of two blocks, 32 px, and a text tower."""
    shapes = dict(OUTER)
    norms = dict(NORMS)
    for tower, d in (("visual.", 128), ("", 64)):
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}."
            norms |= {f"{block}ln_1": d, f"{block}ln_2": d}
            linear = {"attn.in_proj_": (3 * d, d), "attn.out_proj.": (d, d)}
            linear |= {"mlp.c_fc.": (4 * d, d), "mlp.c_proj.": (d, 4 * d)}
            for name, shape in linear.items():
                shapes |= {f"{block}{name}weight": shape, f"{block}{name}bias": shape[:1]}
    for name, d in norms.items():
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    gen = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=gen) * 0.2 for name, shape in shapes.items()}


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def blocks(p, tower, x, heads, mask, act):
    for i in range(2):
        block = f"{tower}transformer.resblocks.{i}."
        z = norm(p, f"{block}ln_1", x) @ p[f"{block}attn.in_proj_weight"].T + p[f"{block}attn.in_proj_bias"]
        q, k, v = z.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + mask
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ p[f"{block}attn.out_proj.weight"].T + p[f"{block}attn.out_proj.bias"]
        z = act(norm(p, f"{block}ln_2", x) @ p[f"{block}mlp.c_fc.weight"].T + p[f"{block}mlp.c_fc.bias"])
        x = x + z @ p[f"{block}mlp.c_proj.weight"].T + p[f"{block}mlp.c_proj.bias"]
    return x


def naive_image(p, pixels, heads=2, act=quick_gelu):
    """Radford et al. 2021, arXiv:2103.00020, as clip/model.py has it: [b, 3, 32, 32] -> [b, 48]."""
    x = F.conv2d(pixels, p["visual.conv1.weight"], stride=8).flatten(2).mT
    x = (
        torch.cat([p["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
        + p["visual.positional_embedding"]
    )
    x = blocks(p, "visual.", norm(p, "visual.ln_pre", x), heads, 0.0, act)
    return norm(p, "visual.ln_post", x[:, 0]) @ p["visual.proj"]


def naive_text(p, ids, heads=1, act=quick_gelu):
    """The same of token ids [b, t], read at the highest id, which is the end token."""
    x = p["token_embedding.weight"][ids] + p["positional_embedding"][: ids.shape[1]]
    causal = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    x = norm(p, "ln_final", blocks(p, "", x, heads, causal, act))
    return x[torch.arange(len(ids)), ids.argmax(1)] @ p["text_projection"]


def texts():
    """Ids [2, 12] and mask: two texts between start (88) and end (89), padded with 0 as OpenAI does."""
    ids = torch.randint(1, 88, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 88
    mask = torch.zeros(2, 12, dtype=torch.bool)
    for row, end in enumerate((5, 11)):
        ids[row, end], ids[row, end + 1 :], mask[row, : end + 1] = 89, 0, True
    return ids, mask


def image_and_text(path, state):
    """What the loaded towers make of an image and two texts, projected by the checkpoint's projections."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    vit, vision = loading.load_encoder(path, "vision")
    tower, text = loading.load_encoder(path, "text")
    ids, mask = texts()
    with torch.no_grad():
        image = vit(vision, pixels).pooler_output @ state["visual.proj"]
        rows = encode_text_with(text, ids, mask, model=tower, pool="last") @ state["text_projection"]
    return pixels, image, ids, rows


def settings(folder, **model_cfg):
    (folder / clip.SETTINGS).write_text(json.dumps({"model_cfg": {"quick_gelu": True} | model_cfg}))


def test_openai_clip(tmp_path):
    state = original()
    # A file of OpenAI's has its settings as tensors.
    torch.save(
        state | {"input_resolution": torch.tensor(32), "vocab_size": torch.tensor(90)}, tmp_path / "ViT-X.pt"
    )
    with pytest.warns(UserWarning, match="no open_clip_config.json beside it: quick_gelu is taken"):
        pixels, image, ids, rows = image_and_text(tmp_path / "ViT-X.pt", state)
    torch.testing.assert_close(image, naive_image(state, pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows, naive_text(state, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.filterwarnings("error")
def test_open_clip(tmp_path, quick):
    state = original()
    published = {}
    for name, tensor in state.items():
        is_text = re.match("transformer|token_emb|positional|ln_final|text_proj", name)
        published[f"text.{name}" if is_text else name] = tensor
    save_file(published, tmp_path / "open_clip_model.safetensors")
    towers = {"vision_cfg": {"layers": 2, "width": 128, "head_width": 32}, "text_cfg": {"heads": 4}}
    settings(tmp_path, quick_gelu=quick, **towers)
    pixels, image, ids, rows = image_and_text(tmp_path / "open_clip_model.safetensors", state)
    act, other = (quick_gelu, F.gelu) if quick else (F.gelu, quick_gelu)
    torch.testing.assert_close(image, naive_image(state, pixels, 4, act), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows, naive_text(state, ids, 4, act), rtol=1e-5, atol=1e-5)
    # The activation is told apart, and so are the heads.
    assert (image - naive_image(state, pixels, 4, other)).abs().max() > 1e-2
    assert (rows - naive_text(state, ids, 2, act)).abs().max() > 1e-2


def test_transformers_clip_written_in_the_names_of_openai(tmp_path):
    """transformers' CLIPModel and its towers read back from OpenAI's names: the same weights, the same features."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = vision | {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "vocab_size": 90,
        "max_position_embeddings": 12,
    }
    # transformers pools by the end token, and by the highest id where it is 2: both are 89 here.
    config = CLIPConfig(
        text_config=text | {"eos_token_id": 89},
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        projection_dim=48,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    theirs = model.state_dict()
    state = {
        "visual.proj": theirs["visual_projection.weight"].T,
        "text_projection": theirs["text_projection.weight"].T,
    }
    backwards = {new: old for old, new in clip._NAMES.items()}
    for name, tensor in theirs.items():
        if not re.match("(text|vision)_model", name) or re.search(r"(k|v)_proj", name):
            continue
        tower, _, inside = name.partition(".")
        if "q_proj" in inside:
            tensor = torch.cat([theirs[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            inside = inside.replace("q_proj.", "in_proj_")
        for new, old in backwards.items():
            inside = inside.replace(new, old)
        state[inside if tower == "text_model" else f"visual.{inside}"] = tensor.contiguous()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    settings(tmp_path)
    pixels, image, ids, rows = image_and_text(tmp_path / "x.safetensors", state)
    with torch.no_grad():
        their_image = model.get_image_features(pixel_values=pixels).pooler_output
        their_rows = model.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(image, their_image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows, their_rows, rtol=1e-5, atol=1e-5)
    for tower in ("text", "vision"):
        _, params = loading.load_skeleton(tmp_path / "x.safetensors", part=tower)
        for name, weight in params.items():
            assert torch.equal(weight, theirs[f"{tower}_model.{name}"])


def test_a_clip_encodes_slices(tmp_path):
    save_file(original(), tmp_path / "x.safetensors")
    settings(tmp_path)
    vit, params = loading.load_encoder(tmp_path / "x.safetensors", "vision")
    assert loading.encoder_config(tmp_path / "x.safetensors", "vision")["hidden_size"] == 128
    # open_clip's default of heads is not OpenAI's.
    for described, heads in (({}, 1), ({"width": 64}, 8)):
        settings(tmp_path, text_cfg=described)
        found = loading.encoder_config(tmp_path / "x.safetensors", "text")
        assert (found["num_attention_heads"], found["vocab_size"]) == (heads, 90)
    voxels = torch.randint(
        0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mask = torch.tensor([[True, True, False]])
    cfg = encode.EncodeConfig()
    with torch.no_grad():
        rows = encode.encode_slices(cfg, params, voxels, mask, vit=vit)
    expected = naive_image(original() | {"visual.proj": torch.eye(128)}, encode.windows(cfg, voxels[0, :2]))
    torch.testing.assert_close(rows[0, :2], expected, rtol=1e-4, atol=1e-4)


def resnet():
    """The names of RN50, whose text tower is CLIP's own."""
    names = ("visual.conv1.weight", "visual.layer1.0.conv1.weight", "visual.attnpool.c_proj.weight")
    text = {name: tensor for name, tensor in original().items() if not name.startswith("visual.")}
    return text | {name: torch.zeros(2, 2) for name in names}


def test_what_is_no_such_tower_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    settings(tmp_path)
    save_file(resnet(), path)
    with pytest.raises(
        ValueError, match=r"vision tower must be a transformer of CLIP's own.* RN50, only the text"
    ):
        loading.load_encoder(path, "vision")
    assert loading.load_skeleton(path, part="text")[0].config["vocab_size"] == 90
    save_file(original(), path)
    with pytest.raises(
        ValueError, match=r"x.safetensors is a CLIP, of two towers; take one with part='text'"
    ):
        loading.load_skeleton(path)
    # The settings of RN50 beside the weights of a ViT, and what shapes do not tell.
    settings(tmp_path, vision_cfg={"layers": [3, 4, 6, 3], "width": 64})
    with pytest.raises(ValueError, match=r"config.json describes another vision tower, by layers, width"):
        loading.load_skeleton(path, part="vision")
    # What CoCa adds to its text tower, and shapes of CLIP's own do not have.
    settings(tmp_path)
    for prefix in ("", "text."):
        save_file({**original(), f"{prefix}cls_emb": torch.zeros(64)}, path)
        with pytest.raises(ValueError, match="unexpected cls_emb"):
            loading.load_skeleton(path, part="text")
    save_file(original(), path)
    settings(tmp_path, text_cfg={"no_causal_mask": True})
    with pytest.raises(ValueError, match="describes another text tower, by no_causal_mask"):
        loading.load_skeleton(path, part="text")
    for broken in (
        {"vision_cfg": {"head_width": 0}},
        {"vision_cfg": [1]},
        {"vision_cfg": {"head_width": "64"}},
    ):
        settings(tmp_path, **broken)
        with pytest.raises(ValueError, match=r"open_clip_config.json is not as open_clip writes it"):
            loading.load_skeleton(path, part="vision")
    (tmp_path / clip.SETTINGS).write_text("{}")
    with pytest.raises(ValueError, match=r"is not as open_clip writes it \(KeyError: 'model_cfg'\)"):
        loading.load_skeleton(path, part="vision")
    # What belongs to no ViT of CLIP's, such as layer scale, is named.
    settings(tmp_path)
    save_file(original() | {"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(128)}, path)
    with pytest.raises(ValueError, match=r"unexpected encoder.layers.0.ls_1.gamma"):
        loading.load_skeleton(path, part="vision")


def test_code_in_an_archive_is_not_run(tmp_path):
    class Half(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    torch.jit.trace(Half(2, 2), torch.zeros(1, 2)).save(tmp_path / "ViT.pt")
    with pytest.raises(
        ValueError, match="an archive of TorchScript with code, which is never run; if you trust it"
    ):
        loading.load_skeleton(tmp_path / "ViT.pt", part="vision")
    torch.save(torch.jit.load(tmp_path / "ViT.pt", map_location="cpu").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="must be an original DINOv2 checkpoint"):
        loading.load_skeleton(tmp_path / "weights.pt", part="vision")


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_every_missing_or_misshapen_weight_is_an_error(tmp_path, tower):
    settings(tmp_path)
    state = original()
    own = [name for name in state if name.startswith("visual.") == (tower == "vision")]
    read = [name for name in own if name not in ("visual.proj", "text_projection", "logit_scale")]
    for name in read:
        for changed in (None, state[name][..., :1]):
            broken = {n: t.contiguous() for n, t in (state | {name: changed}).items() if t is not None}
            if changed is not None and changed.shape == state[name].shape:
                continue
            save_file(broken, tmp_path / "x.safetensors")
            with pytest.raises(ValueError, match=r"load: |config"):
                loading.load_skeleton(tmp_path / "x.safetensors", part=tower)
