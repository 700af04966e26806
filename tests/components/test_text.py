import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from medvl.base.tree import flatten, unflatten
from medvl.components.text import TextConfig, encode_text, encode_text_with, init_text, pool_tokens

CFG = TextConfig(vocabulary=50, context=12, dim=32, depth=3, heads=4)


def _from_clip(state: dict) -> dict:
    """transformers' CLIPTextModel names -> ours (q, k, v packed)."""
    get = lambda n: state["text_model." + n] if "text_model." + n in state else state[n]
    flat = {
        "token": get("embeddings.token_embedding.weight"),
        "position": get("embeddings.position_embedding.weight"),
        "norm/weight": get("final_layer_norm.weight"),
        "norm/bias": get("final_layer_norm.bias"),
    }
    pairs = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "out": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    for i in range(CFG.depth):
        for kind in ("weight", "bias"):
            at = f"encoder.layers.{i}."
            flat |= {
                f"blocks/{i}/{ours}/{kind}": get(f"{at}{theirs}.{kind}") for ours, theirs in pairs.items()
            }
            flat[f"blocks/{i}/qkv/{kind}"] = torch.cat([get(f"{at}self_attn.{n}_proj.{kind}") for n in "qkv"])
    return unflatten(flat)


def _tokens(gen):
    ids = torch.randint(3, 49, (4, 12), generator=gen)
    lengths = torch.tensor([12, 5, 2, 9])
    mask = torch.arange(12)[None] < lengths[:, None]
    ids[torch.arange(4), lengths - 1] = 49  # the end token
    return ids, mask


def test_equals_transformers_clip_text(gen):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    peer = CLIPTextModel(
        CLIPTextConfig(**sizes, max_position_embeddings=12, eos_token_id=49, bos_token_id=1)
    ).eval()
    ids, mask = _tokens(gen)
    ours = encode_text(CFG, _from_clip(peer.state_dict()), ids, mask)
    with torch.no_grad():
        theirs = peer(input_ids=ids, attention_mask=mask.long()).pooler_output
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(gen):
    p, (ids, mask) = init_text(CFG, gen), _tokens(gen)
    want = encode_text(CFG, p, ids, mask)
    torch.testing.assert_close(encode_text(CFG, p, ids[1:2, :5], mask[1:2, :5])[0], want[1])
    other = torch.where(mask, ids, 7)
    torch.testing.assert_close(encode_text(CFG, p, other, mask), want)


def test_init_gives_the_documented_tree(gen):
    shapes = {n: tuple(t.shape) for n, t in flatten(init_text(CFG, gen)).items()}
    assert shapes["token"] == (50, 32)
    assert shapes["position"] == (12, 32)
    assert shapes["blocks/2/qkv/weight"] == (96, 32)


def test_any_encoder_by_pooling(gen):
    x, (_, mask) = torch.randn(4, 12, 8, generator=gen), _tokens(gen)

    class Out:
        last_hidden_state = x

    model = lambda params, input_ids, attention_mask: Out
    for pool in ("first", "last", "mean"):
        torch.testing.assert_close(
            encode_text_with({}, mask.long(), mask, model=model, pool=pool), pool_tokens(pool, x, mask)
        )
    torch.testing.assert_close(pool_tokens("last", x, mask)[1], x[1, 4])
    torch.testing.assert_close(pool_tokens("mean", x, mask)[1], x[1, :5].mean(0))


def test_errors(gen):
    p, (ids, mask) = init_text(CFG, gen), _tokens(gen)
    with pytest.raises(ValueError, match="t <= 12"):
        encode_text(CFG, p, torch.cat([ids, ids], 1), torch.cat([mask, mask], 1))
    with pytest.raises(ValueError, match=r"0\.\.49, found"):
        encode_text(CFG, p, ids + 40, mask)
    with pytest.raises(ValueError, match="multiple of heads"):
        TextConfig(dim=30, heads=4)
