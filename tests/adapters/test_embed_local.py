"""What a picture's features are; that the rest is scikit-learn's pipelines is said in test_embed."""

import numpy as np
from PIL import Image

from medvl.adapters.embed_local import BLOCKS, image_features


def test_features_tell_colour_place_direction_and_grain():
    parts = lambda image: np.split(image_features(image), np.cumsum(BLOCKS)[:-1])
    plain = lambda *rgb: Image.new("RGB", (64, 64), rgb)
    assert parts(plain(90, 90, 90))[0].nonzero()[0].tolist() == [16 + 4 + 1]
    assert parts(plain(250, 0, 0))[0].nonzero()[0].tolist() == [3 * 16]
    corner = plain(0, 0, 0)
    corner.paste((255, 255, 255), (60, 0, 64, 4))
    assert parts(corner)[1].reshape(16, 16, 3)[..., 0].argmax() == 15  # first row, last column
    for step in (16, 8, 4):  # lines: 64 / step periods, every fourth of them a ring
        upright = plain(0, 0, 0)
        for x in range(0, 64, step):
            upright.paste((255, 255, 255), (x, 0, x + step // 2, 64))
        lying = upright.transpose(Image.Transpose.ROTATE_90)
        assert [parts(p)[2].reshape(16, 8).sum(0).argmax() for p in (upright, lying)] == [0, 4]
        assert parts(upright)[3].argmax() == 64 // step // 4
    assert parts(plain(90, 90, 90))[3].max() < np.log(2e-6)
    assert np.isfinite(image_features(Image.new("RGB", (1, 1)))).all()
