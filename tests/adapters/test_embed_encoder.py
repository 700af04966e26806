"""embed_encoder: transformers' own models are the peers; checkpoints are tiny, random and in the real formats."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from medvl.adapters import embed, embedders
from medvl.adapters.embed_config import EmbedConfig
from medvl.hub import tokens
from medvl.language.images import cap_pixels
from tests import tiny
from tests.adapters.tiny_encoders import PICTURES, REPORTS, close, encoder, unit

SEEN = [PICTURES[:2], [], PICTURES[2:3]]
TEXTS = ["The heart is normal in size.", "Nodule", "No pleural effusion", "nodule of 12 mm"]


def naive(model, folder, text, pool):
    ids = torch.tensor([tokens.tokenizer(folder)(text)["input_ids"]])
    with torch.no_grad():
        x = model(input_ids=ids).last_hidden_state[0]
    return {"first": x[0], "last": x[-1], "mean": x.mean(0), "max": x.amax(0)}[pool]


@pytest.mark.parametrize("pool", ["first", "last", "mean", "max"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3"])
def test_text_equals_transformers_and_batches_do_not_matter(models, kind, pool):
    folder, model = models[kind]
    want = unit(torch.stack([naive(model, folder, "Ask: " + t, pool) for t in TEXTS]))
    for batch in (1, 3, 32):
        close(
            embed.embed_queries(encoder(models, kind, pool=pool, instruction="Ask: ", batch=batch), TEXTS),
            want,
        )


def test_left_padding_of_the_tokenizer_changes_nothing(models, tmp_path):
    """Qwen3-Embedding is used with padding on the left and the last place."""
    folder, model = models["qwen3"]
    tok = tokens.tokenizer(folder)
    tok.padding_side = "left"
    inputs = tok(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = unit(
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state[
                :, -1
            ]
        )
    assert (inputs["attention_mask"] == 0).any()
    model.save_pretrained(tmp_path / "left")
    tok.save_pretrained(tmp_path / "left")
    made = embedders.open_embedder(EmbedConfig(kind="text", name=str(tmp_path / "left"), pool="last"))
    assert made.tokenizer.padding_side == "left"
    close(embed.embed_queries(made, TEXTS), want)


def test_long_texts_are_cut_with_a_warning(models):
    long = " ".join(TEXTS * 5)
    ids = tokens.tokenizer(models["bert"][0])(long)["input_ids"]
    assert len(ids) > 64
    with torch.no_grad():
        want = unit(
            models["bert"][1](input_ids=torch.tensor([[*ids[:9], ids[-1]]])).last_hidden_state.mean(1)
        )
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 10 tokens"):
        close(embed.embed_queries(encoder(models, "bert", context=10), ["heart", long])[1:], want)
    for kind, most in (
        ("bert", 64),
        ("roberta", 20),
        ("clip", 20),
        ("siglip", 20),
    ):  # no more than it has positions
        with pytest.warns(UserWarning, match=f"1 of 1 texts are longer than {most} tokens"):
            embed.embed_queries(encoder(models, kind), [long])


def test_matryoshka(models):
    want = embed.embed_queries(encoder(models, "bert"), TEXTS)
    close(embed.embed_queries(encoder(models, "bert", dims=8), TEXTS), unit(want[:, :8]))
    with pytest.raises(ValueError, match=r"dims must be at most the width 24 of the embedding, got 25"):
        embed.embed_queries(encoder(models, "bert", dims=25), TEXTS)


def features(models, kind, texts=(), pictures=()):
    """transformers' own get_text_features and get_image_features."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    folder, model = models[kind]
    with torch.no_grad():
        if texts:
            inputs = tokens.tokenizer(folder)(
                list(texts), padding="max_length", max_length=20, return_tensors="pt"
            )
            inputs = {
                k: inputs[k] for k in (("input_ids", "attention_mask") if kind == "clip" else ("input_ids",))
            }
            return unit(model.get_text_features(**inputs).pooler_output)
        of = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[kind].from_pretrained(folder)
        return unit(
            model.get_image_features(
                pixel_values=of(images=list(pictures), return_tensors="pt")["pixel_values"]
            ).pooler_output
        )


@pytest.mark.filterwarnings("ignore:embed")
def test_threads_share_an_embedder(models):
    """Long texts are cut off beside short ones: truncation is no setting that one thread leaves to another."""
    made = encoder(models, "bert", context=12)
    batches = [[REPORTS[i % 4] * (1 + 30 * (i % 2))] * (1 + 3 * (i % 3)) for i in range(8)]
    want = [embed.embed_queries(made, texts) for texts in batches]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: embed.embed_queries(made, batches[i % 8]), range(240)))
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(f, want[i % 8]) for i, f in enumerate(found))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_image_text_equals_transformers(models, kind):
    text, image = features(models, kind, TEXTS), features(models, kind, pictures=PICTURES)
    made = encoder(models, kind, batch=2)
    close(embed.embed_queries(made, TEXTS), text)
    close(embed.embed_queries(made, [""] * 5, [[p] for p in PICTURES]), image)
    words = ["<image>\n" + TEXTS[0], TEXTS[1], " <image>\n"]
    mean = unit(torch.stack([image[0] + image[1], image[2], image[2]]))
    want = unit(torch.stack([0.7 * text[0] + 0.3 * mean[0], text[1], mean[2]]))
    found = embed.embed_queries(made, words, SEEN)
    close(found, want)
    for i in range(3):
        close(embed.embed_queries(made, words[i : i + 1], SEEN[i : i + 1])[0], found[i])
    reduced = embed.embed_queries(encoder(models, kind, dims=6), words, SEEN)
    mean = unit(torch.stack([unit(image[0, :6]) + unit(image[1, :6]), image[2, :6], image[2, :6]]))
    close(reduced, unit(torch.stack([0.7 * unit(text[0, :6]) + 0.3 * mean[0], unit(text[1, :6]), mean[2]])))


def test_large_images_are_made_smaller_first(models):
    large = tiny.drawn((400, 300))
    made = encoder(models, "clip", max_pixels=2000)
    close(
        embed.embed_queries(made, [""], [[large]]),
        features(models, "clip", pictures=[cap_pixels(large, 2000)]),
    )
    assert (
        embed.embed_queries(made, [""], [[large]]) - features(models, "clip", pictures=[large])
    ).abs().max() > 1e-3


def test_image_processors_of_older_and_newer_checkpoints(models, tmp_path):
    about = json.loads((models["clip"][0] / "preprocessor_config.json").read_text())
    sizes = {k: about[k] for k in ("size", "crop_size")}
    for i, kind in enumerate(
        (
            {"image_processor_type": "CLIPImageProcessorFast"},
            {"feature_extractor_type": "CLIPFeatureExtractor"},
        )
    ):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "preprocessor_config.json").write_text(json.dumps(kind | sizes))
        made = tokens.image_processor(tmp_path / str(i))
        assert (type(made).__name__, dict(made.size)) == ("CLIPImageProcessorPil", sizes["size"])
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": about, "processor_class": "CLIPProcessor"})
    )
    assert dict(tokens.image_processor(tmp_path).size) == sizes["size"]
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "OwnProcessor", "auto_map": {"AutoImageProcessor": "own.Own"}}'
    )
    with pytest.raises(
        ValueError, match=r"must name one that transformers has on Pillow .* found 'OwnProcessor'"
    ):
        tokens.image_processor(tmp_path)
    with pytest.raises(ValueError, match=r"must hold preprocessor_config.json or processor_config.json"):
        tokens.image_processor(models["bert"][0])
