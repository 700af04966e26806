"""retriever_config: what cannot be is refused."""

import pytest

from medvl.adapters.retriever_config import RetrieverConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": -1}, "steps must be a whole number >= 0, got -1"),
        ({"negatives": 0}, "negatives must be a whole number >= 1, got 0"),
        ({"batch": 2.0}, "batch must be a whole number >= 1, got 2.0"),
        ({"every": 0}, "every must be a whole number >= 1"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"lr": 0.0}, "needs lr > 0 and weight_decay >= 0, got 0.0 and 0.0"),
        ({"weight_decay": -0.1}, "got 0.003 and -0.1"),
    ],
)
def test_record_errors(wrong, message):
    with pytest.raises(ValueError, match=f"RetrieverConfig: .*{message}"):
        RetrieverConfig(**wrong)


def test_whitening_needs_a_shrink():
    with pytest.raises(
        ValueError, match="kind must be none, contrast or whiten and shrink > 0, got 'whiten', 0"
    ):
        RetrieverConfig(kind="whiten", shrink=0)
