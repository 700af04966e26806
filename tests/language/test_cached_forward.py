"""cached_forward: transformers' generate is the peer, under either name that it gives the cache."""

import functools
from types import SimpleNamespace

import pytest
import torch

from medvl.language import cached_forward, vlm
from tests import tiny

COUNTS = (1, 2)
model = functools.cache(tiny.model)


class Renamed(torch.nn.Module):
    """A model whose forward pass and output call the cache by one name only, as before transformers 5.2x or after 5.40."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.name = cached_forward.cache_name(inner)

    def run(self, cache, kwargs):
        out = self.inner(**kwargs, **({} if cache is None else {self.name: cache}))
        return out.logits, getattr(out, self.name)


class Older(Renamed):
    def forward(self, *, past_key_values=None, logits_to_keep=0, **kwargs):
        logits, cache = self.run(past_key_values, kwargs)
        return SimpleNamespace(logits=logits, past_key_values=cache)


class Newer(Renamed):
    def forward(self, *, cache=None, logits_to_keep=0, **kwargs):
        logits, cache = self.run(cache, kwargs)
        return SimpleNamespace(logits=logits, cache=cache)


@pytest.mark.parametrize("kind", [Older, Newer])
@pytest.mark.parametrize("room", [0, 1, 2])
def test_the_cache_is_found_under_its_older_and_its_newer_name(kind, room):
    skeleton, params = model("qwen3")
    inputs = tiny.batch("qwen3", COUNTS)
    renamed = kind(tiny.peer(skeleton, params))
    call = vlm.model_inputs(skeleton, tiny.renamed(inputs))
    options = torch.tensor([[5, 6, 7], [8, 9, 0]])
    real = options > 0

    def tokens_of(model_):
        decoding, written = cached_forward.start_decoding(model_, call, 4), []
        for step in range(5):
            written.append(decoding.logits.argmax(-1))
            if step < 4:
                cached_forward.decode_tokens(model_, decoding, written[-1])
        prompt = cached_forward.forward_prompt(model_, call, room)
        return torch.stack(written, 1), cached_forward.continuation_log_probs(
            model_, call, prompt, options, real
        )

    with torch.no_grad():
        written, scores = tokens_of(renamed)
        want = tokens_of(tiny.peer(skeleton, params))
    assert torch.equal(
        written, tiny.peer_tokens(skeleton, params, inputs, 5, min_new_tokens=5, eos_token_id=None)
    )
    assert torch.equal(scores, want[1])


def test_left_padded_moves_and_trims():
    ids, mask = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    out = cached_forward.left_padded(
        {
            "ids": ids,
            "mask": mask,
            "position_ids": ids.expand(3, -1, -1),
            "inputs_embeds": ids[..., None].float(),
        }
    )
    assert out["ids"].tolist() == [[5, 6], [0, 7]]
    assert out["mask"].tolist() == [[1, 1], [0, 1]]
    assert out["position_ids"].tolist() == [[[5, 6], [0, 7]]] * 3
    assert out["inputs_embeds"][..., 0].tolist() == [[5, 6], [0, 7]]
    with pytest.raises(
        ValueError, match=r"left_padded: ids must be of the mask's rows and tokens \[2, 4\], got \[2, 3\]"
    ):
        cached_forward.left_padded({"ids": ids[:, 1:], "mask": mask})


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_rows_go_on_without_the_others(kind):
    skeleton, params = model(kind)
    call = vlm.model_inputs(skeleton, tiny.renamed(tiny.batch(kind, (1, 2, 0))))
    module = tiny.peer(skeleton, params)
    tokens = torch.randint(3, 140, (3, 12), generator=torch.Generator().manual_seed(2))
    kept = torch.tensor([2, 0])
    with torch.no_grad():
        whole = cached_forward.start_decoding(module, call, 12)
        part = cached_forward.start_decoding(module, call, 12)
        for step in range(12):
            if step == 4:
                assert cached_forward.can_keep_rows(part)
                cached_forward.keep_rows(part, kept)
            cached_forward.decode_tokens(module, whole, tokens[:, step])
            cached_forward.decode_tokens(module, part, tokens[:, step] if step < 4 else tokens[kept, step])
            want = whole.logits if step < 4 else whole.logits[kept]
            torch.testing.assert_close(part.logits, want, rtol=1e-4, atol=1e-5)
