"""embed_config: what cannot be is refused."""

import pytest

from medvl.adapters.embed_config import EmbedConfig


def test_config_errors():
    for settings, said in (
        ({"kind": "tfidf"}, "kind must be one of"),
        ({"kind": "text"}, "need a name"),
        ({"name": "bert"}, "'local' has none"),
        ({"instruction": "Ask: "}, "only they have an instruction"),
        ({"dims": -1}, "dims must be >= 0"),
        ({"max_images": 0}, "max_images"),
        ({"shares": (0.0, 0.0)}, "one above 0"),
        ({"shares": (1.0, float("nan"))}, "one above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            EmbedConfig(**settings)
