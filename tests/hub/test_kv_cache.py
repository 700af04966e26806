"""kv_cache: transformers' own layers, which copy everything for every token, are the peer."""

import copy

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from medvl.hub import kv_cache

WINDOW = 5


def new_layer(kind):
    return DynamicLayer() if kind == "full" else DynamicSlidingWindowLayer(WINDOW)


def both(kind, prompt, room, gen, b=3):
    """(a layer of transformers, one with room) after a prompt."""
    pair = []
    keys, values = torch.randn(b, 2, prompt, 4, generator=gen), torch.randn(b, 2, prompt, 6, generator=gen)
    for _ in range(2):
        layer = new_layer(kind)
        layer.update(keys, values)
        pair.append(layer)
    cache = DynamicCache()
    cache.layers = [pair[1]]
    kv_cache.reserve_room(cache, room)
    assert isinstance(cache.layers[0], kv_cache.Roomy)
    return pair[0], cache.layers[0]


def add(layers, tokens, gen):
    """Put new tokens into all layers, and compare what they answer with the first one's."""
    b = len(layers[0].keys)
    keys, values = torch.randn(b, 2, tokens, 4, generator=gen), torch.randn(b, 2, tokens, 6, generator=gen)
    sizes = layers[0].get_mask_sizes(tokens)
    want = layers[0].update(keys, values)
    for layer in layers[1:]:
        assert layer.get_mask_sizes(tokens) == sizes
        got = layer.update(keys, values)
        assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))
        assert layer.get_seq_length() == layers[0].get_seq_length()
        assert torch.equal(layer.keys, layers[0].keys)
        assert torch.equal(layer.values, layers[0].values)


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("prompt", [1, 4, 9])
@pytest.mark.parametrize("room", [2, 40])
def test_it_holds_what_a_growing_layer_holds(kind, prompt, room, gen, monkeypatch):
    monkeypatch.setattr(kv_cache, "BLOCK", 7)
    layers = both(kind, prompt, room, gen)
    for tokens in (1, 1, 3, *[1] * 20, 9, 1):
        add(layers, tokens, gen)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_tokens_are_written_in_place(kind, gen):
    _, layer = both(kind, 3, 12, gen)
    memory = layer._key_room
    for _ in range(12):
        layer.update(torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 6))
        assert layer.keys.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert memory.shape[-2] == 15


def test_room_is_taken_in_blocks(gen):
    _, layer = both("full", 3, 1000, gen)
    assert layer._key_room.shape[-2] == 3 + kv_cache.BLOCK
    for _ in range(kv_cache.BLOCK + 1):
        layer.update(torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 6))
    assert layer._key_room.shape[-2] == 3 + 2 * kv_cache.BLOCK


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_copies_write_into_the_same_room_one_after_the_other(kind, gen):
    theirs, layer = both(kind, 8, 4, gen)
    for _ in range(3):
        mine, other = copy.copy(layer), copy.copy(theirs)
        add([other, mine], 4, gen)
        assert mine._key_room is layer._key_room
        assert torch.equal(layer.keys, theirs.keys)
        add([other, mine], 2, gen)  # more than there is room for: in memory of its own
        assert mine._key_room is not layer._key_room


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_what_transformers_offers_besides(kind, gen):
    layers = both(kind, 3, 20, gen)
    for change in (
        lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.crop(-1),
    ):
        for layer in layers:
            change(layer)
        add(layers, 1, gen)
        if kind == "sliding" and layers[0].get_seq_length() >= WINDOW - 1:
            break  # past its window a layer cannot be cropped


def test_other_layers_stay_as_they_are(gen):
    class Mine(DynamicLayer):
        pass

    cache = Cache(layers=[StaticLayer(max_cache_len=4), Mine(), DynamicLayer()])
    layers = list(cache.layers)
    kv_cache.reserve_room(cache, 4)
    assert cache.layers == layers  # the last one holds nothing yet
    assert not kv_cache.can_select_rows(cache)
    kv_cache.reserve_room(object(), 4)
    assert not kv_cache.can_select_rows(object())
