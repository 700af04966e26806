"""weight_names: names of weights in files of other versions of transformers."""

from medvl.hub import loading, skeletons
from tests import tiny


def test_layouts_of_before_transformers_5_are_mapped(tmp_path):
    """Qwen2-VL before 4.52 (visual.*, model.*) and the in-memory names of today (model.visual.*, model.language_model.*) are one model."""
    for kind in ("qwen2_vl", "qwen2_5_vl"):
        skeleton, params = tiny.model(kind)
        old = {
            n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
            for n, t in params.items()
        }
        for state in (old, params):
            _, loaded = loading.bind_weights(skeleton.config, state, head="language")
            assert skeletons.weights_digest(loaded) == skeletons.weights_digest(params)
    skeleton, params = tiny.model("internvl")
    old = {
        "language_model." + n.removeprefix("model.language_model."): t
        for n, t in params.items()
        if "model.language_model" in n
    }
    old = {n.replace("language_model.", "language_model.model.", 1): t for n, t in old.items()}
    old |= {
        n.removeprefix("model."): t
        for n, t in params.items()
        if "model.language_model" not in n and n != "lm_head.weight"
    }
    _, loaded = loading.bind_weights(
        skeleton.config, old | {"language_model.lm_head.weight": params["lm_head.weight"]}, head="language"
    )
    assert skeletons.weights_digest(loaded) == skeletons.weights_digest(params)
