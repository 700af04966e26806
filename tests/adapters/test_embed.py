"""embed: scikit-learn's pipelines and transformers' own models are the peers; checkpoints are tiny, random and in the real formats."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from PIL import Image

from medvl.adapters import embed, embed_local
from medvl.hub import tokens
from medvl.language.images import cap_pixels, open_image
from tests import tiny

REPORTS = [
    "The heart is normal in size.",
    "No pleural effusion; the heart is normal.",
    "Nodule of 12 mm in the left upper lobe.",
    "Fundus",
]
PICTURES = [tiny.drawn((40 + 9 * i, 50), seed=i) for i in range(5)]
QUERIES = ["<image>\n<image>\nIs the heart normal?", "No effusion, nodule", "<image>\nnodule left"]
SEEN = [PICTURES[:2], [], PICTURES[2:3]]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # of tokens.train_bpe


def write(folder, kind, std=0.2, **config):
    """A checkpoint with every weight random, and a tokenizer that learnt a few reports; returns transformers' own module."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * std)
    tokens.train_bpe(REPORTS * 4, 300, folder)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind: (folder, transformers' module)}."""
    where = tmp_path_factory.mktemp("models")
    sides = {"vision_config": VISION, "text_config": TEXT | {"max_position_embeddings": 20} | ENDS}
    made = {
        "bert": write(where / "bert", "bert", **TEXT, max_position_embeddings=64, pad_token_id=2),
        "roberta": write(where / "roberta", "roberta", **TEXT, max_position_embeddings=23, pad_token_id=2),
        "qwen3": write(where / "qwen3", "qwen3", **(tiny.TEXT | {"vocab_size": 300, "head_dim": 8} | ENDS)),
        "clip": write(where / "clip", "clip", **sides, projection_dim=16),
        "siglip": write(
            where / "siglip",
            "siglip",
            **(sides | {"text_config": sides["text_config"] | {"projection_size": 32}}),
        ),
    }
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (where / "clip/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor"} | size)
    )
    size = {"size": {"height": 32, "width": 32}}
    (where / "siglip/preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SiglipImageProcessor"} | size)
    )
    return {kind: (where / kind, model) for kind, model in made.items()}


def encoder(models, kind, **settings):
    which = "image_text" if kind in ("clip", "siglip") else "text"
    return embed.open_embedder(embed.EmbedConfig(kind=which, name=str(models[kind][0]), **settings))


def unit(x):
    return F.normalize(torch.as_tensor(np.asarray(x)).double(), dim=-1)


def close(ours, theirs, atol=2e-6):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)


# Local ----------------------------------------------------------------------------------------------------------------------------------
def test_local_text_is_tfidf_and_truncated_svd():
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    texts = [*REPORTS, "Nodule, nodule and nodule in the lower lobe, lobe"]
    made = embed.fit_local(embed.EmbedConfig(dims=3), texts)
    peer = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), TruncatedSVD(3, random_state=0)
    ).fit(texts)
    asked = ["Is the heart normal? The heart.", "nodule effusion", "fundus"]
    ours, theirs = embed.embed_queries(made, asked), unit(peer.transform(asked))
    assert ours.shape == (3, 3)
    close(ours @ ours.T, theirs @ theirs.T)
    whole = embed.fit_local(
        embed.EmbedConfig(), texts
    )  # 64 components: all there are, so the cosines are those of TF-IDF itself
    tfidf = unit(peer[0].transform(texts).toarray())
    close(embed.embed_queries(whole, texts) @ embed.embed_queries(whole, texts).T, tfidf @ tfidf.T)


def test_local_images_are_standardised_features_and_pca():
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    x = np.stack([embed_local.image_features(cap_pixels(p, 900)) for p in PICTURES])
    x = (
        StandardScaler().fit_transform(x)
        * (x.std(0) > 1e-9)
        / np.repeat(np.sqrt(embed_local.BLOCKS), embed_local.BLOCKS)
    )
    assert np.allclose(
        [b.var(0).sum() for b in np.split(x, np.cumsum(embed_local.BLOCKS)[:-1], 1)][1:], 1
    )  # each block counts the same
    made = embed.fit_local(embed.EmbedConfig(dims=3, max_pixels=900), [""] * 5, [[p] for p in PICTURES])
    assert made.vocabulary == ()
    ours, theirs = (
        embed.embed_queries(made, [""] * 5, [[p] for p in PICTURES]),
        unit(PCA(3, svd_solver="full").fit_transform(x)),
    )
    close(ours @ ours.T, theirs @ theirs.T)


def test_local_mixes_by_shares_without_cross_terms():
    made = embed.fit_local(embed.EmbedConfig(dims=3), REPORTS, [[p] for p in PICTURES[:4]])
    text, image = (
        embed.embed_queries(made, REPORTS[:2]),
        embed.embed_queries(made, ["", ""], [[PICTURES[0]], [PICTURES[1], PICTURES[2]]]),
    )
    assert (text[:, 3:] == 0).all()
    assert (image[:, :3] == 0).all()
    both = embed.embed_queries(
        made, REPORTS[:2], [[PICTURES[0]], [PICTURES[1], PICTURES[2], PICTURES[3]]]
    )  # the fourth does not count
    close(both, unit(0.7 * text + 0.3 * image))
    one = [embed.embed_queries(made, [""], [[PICTURES[i]]])[0] for i in (1, 2)]
    close(image[1], unit(one[0] + one[1]))
    unknown = embed.embed_queries(made, ["zzz qqq"], [[PICTURES[0]]])
    assert torch.equal(unknown, image[:1])
    only = evolve(made, cfg=evolve(made.cfg, shares=(1.0, 0.0)))
    assert torch.equal(embed.embed_queries(only, REPORTS[:2], [["/not/looked/at.png"]] * 2), text)


def test_local_rows_alone_and_saved_and_elsewhere(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, picture in zip(paths, PICTURES, strict=True):
        picture.save(path)
    made = embed.fit_local(embed.EmbedConfig(), REPORTS, [[p] for p in PICTURES[:4]])
    seen = [paths[:2], [], [str(paths[2])]]
    want = embed.embed_queries(made, QUERIES, seen)
    close(want.norm(dim=1), torch.ones(3))
    for i in range(3):
        assert torch.equal(embed.embed_queries(made, QUERIES[i : i + 1], seen[i : i + 1])[0], want[i])
    assert embed.fit_local(embed.EmbedConfig(), REPORTS, [[p] for p in paths[:4]]).name == made.name
    assert embed.fit_local(embed.EmbedConfig(), REPORTS[:3]).name != made.name
    embed.save_embedder(embed.with_head(made, torch.eye(want.shape[1])[:, :5]), tmp_path / "saved")
    again = embed.read_embedder(tmp_path / "saved")
    assert again.name == embed.with_head(made, torch.eye(want.shape[1])[:, :5]).name != made.name
    assert torch.equal(embed.embed_queries(again, QUERIES, seen), F.normalize(want[:, :5]))
    embed.save_embedder(made, tmp_path / "bare")
    code = (
        "import sys, torch; from medvl.adapters import embed; folder, out, *paths = sys.argv[1:]; m = embed.read_embedder(folder);"
        f"torch.save(embed.embed_queries(m, {QUERIES!r}, [paths[:2], [], paths[2:3]]), out)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bare"), str(tmp_path / "x.pt"), *map(str, paths)],
        check=True,
    )
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), want)


HOSTILE = {
    "no components": (lambda state, about: state.pop("text.components"), "must hold .*text.components"),
    "an idf of another length": (
        lambda state, about: state.update({"text.idf": state["text.idf"][1:].clone()}),
        "must hold",
    ),
    "no weight": (lambda state, about: state.pop("image.weight"), "must hold .*image.weight"),
    "pictures of other features": (
        lambda state, about: state.update({"image.mean": torch.zeros(3)}),
        "must hold",
    ),
    "whole numbers": (
        lambda state, about: state.update(
            {"text.idf": torch.ones(state["text.idf"].shape, dtype=torch.int64)}
        ),
        "finite numbers",
    ),
    "a tensor more": (lambda state, about: state.update(more=torch.ones(2)), "must hold .*found .*more"),
    "words that are none": (lambda state, about: about["vocabulary"].__setitem__(0, {"a": 1}), "vocabulary"),
    "a word twice": (
        lambda state, about: about["vocabulary"].__setitem__(0, about["vocabulary"][1]),
        "vocabulary",
    ),
    "a head that is no matrix": (
        lambda state, about: state.update(head=torch.ones(4)),
        "head must be finite floating point",
    ),
    "nothing": (
        lambda state, about: (state.clear(), about.update(vocabulary=[])),
        "must hold a vocabulary or images",
    ),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_saved_embedder_of_other_parts_is_refused(tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    embed.save_embedder(
        embed.fit_local(embed.EmbedConfig(), REPORTS, [[p] for p in PICTURES[:4]]), tmp_path / "saved"
    )
    state, about = (
        load_file(tmp_path / "saved/embedder.safetensors"),
        json.loads((tmp_path / "saved/embedder.json").read_text()),
    )
    change(state, about)
    save_file(state, tmp_path / "saved/embedder.safetensors", {"format": "pt"})
    (tmp_path / "saved/embedder.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"read_embedder: .*saved: .*{message}"):
        embed.read_embedder(tmp_path / "saved")


def test_deep_greys_are_shown_through_the_window(tmp_path):
    rows = [np.random.default_rng(i).integers(0, 4000, (40, 40)).astype(np.uint16) for i in range(6)]
    for i, row in enumerate(rows):
        Image.fromarray(row).save(tmp_path / f"{i}.png")
    paths = [[tmp_path / f"{i}.png"] for i in range(6)]
    seen = [[open_image(p, window=(0, 4000))] for (p,) in paths]
    texts = ["lung", "heart", "liver", "bone", "skin", "brain"]
    with pytest.raises(ValueError, match="greys of more than 8 bits"):
        embed.fit_local(embed.EmbedConfig(), texts, paths)
    plain = embed.fit_local(embed.EmbedConfig(), texts, seen)
    made = embed.fit_local(embed.EmbedConfig(window=(0, 4000)), texts, paths)
    assert made.name != plain.name  # other pictures would look other to it
    assert torch.equal(embed.embed_queries(made, texts, paths), embed.embed_queries(plain, texts, seen))
    with pytest.raises(
        ValueError, match=r"EmbedConfig.window must be \[black, white\] with black < white, got \[3, 2\]"
    ):
        embed.EmbedConfig(window=(3, 2))


def test_local_of_little():
    one = embed.fit_local(embed.EmbedConfig(), ["heart"])
    assert embed.embed_queries(one, ["The HEART"]).tolist() == [[1.0]]
    assert embed.embed_queries(embed.fit_local(embed.EmbedConfig(), ["the heart"]), ["heart"]).shape == (1, 1)
    same = embed.fit_local(embed.EmbedConfig(), ["the heart"] * 4, [[p] for p in PICTURES[:2]] * 2)
    assert embed.embed_queries(same, ["heart"], [PICTURES[:1]]).shape == (
        1,
        2,
    )  # what does not vary has no component


# Encoders -------------------------------------------------------------------------------------------------------------------------------
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
    made = embed.open_embedder(embed.EmbedConfig(kind="text", name=str(tmp_path / "left"), pool="last"))
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


def test_encoders_are_saved_by_name(models, tmp_path):
    made = embed.with_head(encoder(models, "clip"), torch.randn(16, 4))
    embed.save_embedder(made, tmp_path / "saved")
    assert (tmp_path / "saved/embedder.safetensors").stat().st_size < 1000
    again = embed.read_embedder(tmp_path / "saved")
    assert again.name == made.name
    assert made.name.startswith("image_text:clip:")
    assert torch.equal(embed.embed_queries(again, QUERIES, SEEN), embed.embed_queries(made, QUERIES, SEEN))
    bare = encoder(models, "clip")
    close(
        embed.embed_queries(made, QUERIES, SEEN), unit(embed.embed_queries(bare, QUERIES, SEEN) @ made.head)
    )
    names = {
        encoder(models, "clip", **s).name
        for s in ({}, {"batch": 2}, {"pool": "last"}, {"dims": 4}, {"shares": (1.0, 1.0)})
    }
    assert len(names) == 3  # batch and, for this kind, pool do not change a vector


# Errors -----------------------------------------------------------------------------------------------------
def test_heads_that_do_not_fit():
    made = embed.fit_local(embed.EmbedConfig(dims=2), REPORTS)
    with pytest.raises(ValueError, match=r"head must be \[2, e\] like the vectors, got \[5, 4\]"):
        embed.embed_queries(embed.with_head(made, torch.ones(5, 4)), REPORTS[:1])
    with pytest.raises(ValueError, match="finite floating point"):
        embed.with_head(made, torch.full((2, 2), torch.inf))


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
            embed.EmbedConfig(**settings)


def test_query_errors(models, tmp_path):
    words = embed.fit_local(embed.EmbedConfig(), REPORTS)
    both = embed.fit_local(embed.EmbedConfig(), REPORTS, [[p] for p in PICTURES[:4]])
    for texts, images, said in (
        ("heart", (), "must be a list of at least one text, got str"),
        ([], (), "at least one text"),
        (["heart"], [[], []], "for each of the 1 texts, got 2"),
        (["heart"], PICTURES[:1], "images must be a list of images"),
        (
            ["heart", "<image>\nzzz"],
            (),
            r"row 1 has nothing to embed: a text of which no word is known .*zzz.* and 0 images",
        ),
        (["heart"], [[tmp_path / "no.png"]], r"image 0 of row 0: .*no.png: no such file"),
        (["heart"], [[PICTURES[0], 7]], r"image 1 of row 0: image must be a PIL image"),
    ):
        with pytest.raises(ValueError, match=said):
            embed.embed_queries(both, texts, images)
    with pytest.raises(ValueError, match=r"row 1 has images, but local:.* was fitted without any"):
        embed.embed_queries(words, ["heart", "heart"], [[], PICTURES[:1]])
    with pytest.raises(ValueError, match="at least two different images, or none, got 1"):
        embed.fit_local(embed.EmbedConfig(), ["heart"], [PICTURES[:1]])
    with pytest.raises(ValueError, match="at least two different images, or none, got 2"):
        embed.fit_local(embed.EmbedConfig(), ["heart"], [[PICTURES[0], PICTURES[0]]])
    with pytest.raises(ValueError, match="must have words of two letters or more"):
        embed.fit_local(embed.EmbedConfig(), ["<image>", "a b"])
    with pytest.raises(ValueError, match="only for kind 'local', got 'text'"):
        embed.fit_local(embed.EmbedConfig(kind="text", name="bert"), REPORTS)
    bert = encoder(models, "bert")
    with pytest.raises(
        ValueError, match=r"kind 'text' takes no images, but row 1 has 1; set shares = \[1, 0\]"
    ):
        embed.embed_queries(bert, ["a", "b"], [[], PICTURES[:1]])
    close(
        embed.embed_queries(encoder(models, "bert", shares=(1.0, 0.0)), ["a"], [PICTURES[:1]]),
        embed.embed_queries(bert, ["a"]),
    )
    with pytest.raises(ValueError, match=r"row 1 has nothing to embed: a text without words .* and 0 images"):
        embed.embed_queries(bert, ["a", " <image>\n"])
    with pytest.raises(ValueError, match=r"row 0 has nothing to embed: a text whose share is 0"):
        embed.embed_queries(encoder(models, "clip", shares=(0.0, 1.0)), ["heart"])


def test_open_and_read_errors(models, tmp_path):
    at = {kind: str(folder) for kind, (folder, _) in models.items()}
    with pytest.raises(ValueError, match="use fit_local"):
        embed.open_embedder(embed.EmbedConfig())
    with pytest.raises(ValueError, match=r"needs a clip or siglip model, .* is a bert"):
        embed.open_embedder(embed.EmbedConfig(kind="image_text", name=at["bert"]))
    with pytest.raises(ValueError, match=r"of text alone, .* is a clip"):
        embed.open_embedder(embed.EmbedConfig(kind="text", name=at["clip"]))
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(ValueError, match=r"of text alone, .* is a t5"):
        embed.open_embedder(embed.EmbedConfig(kind="text", name=str(tmp_path)))
    with pytest.raises(ValueError, match="there is no folder"):
        embed.read_embedder(tmp_path / "nowhere")
    embed.save_embedder(embed.fit_local(embed.EmbedConfig(), REPORTS), tmp_path / "saved")
    with pytest.raises(ValueError, match="is there already"):
        embed.save_embedder(embed.fit_local(embed.EmbedConfig(), REPORTS), tmp_path / "saved")
    about = tmp_path / "saved/embedder.json"
    text = about.read_text()
    about.write_text(text.replace('"heart"', '"heaart"'))
    with pytest.raises(ValueError, match=r"but its content is local:.*the file was changed"):
        embed.read_embedder(tmp_path / "saved")
    about.write_text(text.replace("medvl embedder 1", "medvl embedder 9"))
    with pytest.raises(ValueError, match="must be 'medvl embedder 1'"):
        embed.read_embedder(tmp_path / "saved")
    about.write_text(text.replace('"dims"', '"dim"'))
    with pytest.raises(ValueError, match="unknown key 'dim'"):
        embed.read_embedder(tmp_path / "saved")
    about.write_text(text)
    weights = tmp_path / "saved/embedder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="broken or cut off"):
        embed.read_embedder(tmp_path / "saved")


def test_an_encoder_with_other_weights_is_not_taken(tmp_path):
    config = {**TEXT, "max_position_embeddings": 64, "pad_token_id": 2}
    write(tmp_path / "bert", "bert", **config)
    made = embed.open_embedder(embed.EmbedConfig(kind="text", name=str(tmp_path / "bert")))
    embed.save_embedder(made, tmp_path / "saved")
    assert embed.read_embedder(tmp_path / "saved").name == made.name
    for path in (tmp_path / "bert").iterdir():
        path.unlink()
    write(tmp_path / "bert", "bert", std=0.3, **config)
    with pytest.raises(ValueError, match=r"its content is text:bert:.*the encoder .*bert was changed"):
        embed.read_embedder(tmp_path / "saved")
