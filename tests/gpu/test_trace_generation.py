"""What a decoded token costs on a GPU, counted on meta: with room in the cache, no token copies what it holds."""

from benches.gpu.trace_generation import decoded_token
from tests.gpu.cases import QWEN3


def test_a_cache_with_room_is_not_copied():
    grown = decoded_token(QWEN3, batch=3, prompt=100, grown=True)
    roomy = decoded_token(QWEN3, batch=3, prompt=100)
    assert roomy.flops == grown.flops
    assert roomy.kernels == grown.kernels
    layers, heads, width, nbytes = 2, 2, 16, 2
    assert grown.operations["cat"] - roomy.operations["cat"] == 2 * layers
    # All that is held is read and written again, keys and values, against one new token.
    held = 3 * heads * width * nbytes * 100
    assert grown.bytes - roomy.bytes >= 2 * layers * 2 * held * 0.99
