"""embed: scikit-learn's pipelines are the peers of what is fitted, mixtures and errors those of formulas."""

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image

from medvl.adapters import embed, embed_local, embedders
from medvl.adapters.embed_config import EmbedConfig
from medvl.language.images import cap_pixels, open_image
from tests.adapters.tiny_encoders import PICTURES, REPORTS, close, encoder, unit


def test_local_text_is_tfidf_and_truncated_svd():
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    texts = [*REPORTS, "Nodule, nodule and nodule in the lower lobe, lobe"]
    made = embedders.fit_local(EmbedConfig(dims=3), texts)
    peer = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), TruncatedSVD(3, random_state=0)
    ).fit(texts)
    asked = ["Is the heart normal? The heart.", "nodule effusion", "fundus"]
    ours, theirs = embed.embed_queries(made, asked), unit(peer.transform(asked))
    assert ours.shape == (3, 3)
    close(ours @ ours.T, theirs @ theirs.T)
    whole = embedders.fit_local(
        EmbedConfig(), texts
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
    made = embedders.fit_local(EmbedConfig(dims=3, max_pixels=900), [""] * 5, [[p] for p in PICTURES])
    assert made.vocabulary == ()
    ours, theirs = (
        embed.embed_queries(made, [""] * 5, [[p] for p in PICTURES]),
        unit(PCA(3, svd_solver="full").fit_transform(x)),
    )
    close(ours @ ours.T, theirs @ theirs.T)


def test_local_mixes_by_shares_without_cross_terms():
    made = embedders.fit_local(EmbedConfig(dims=3), REPORTS, [[p] for p in PICTURES[:4]])
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


def test_deep_greys_are_shown_through_the_window(tmp_path):
    rows = [np.random.default_rng(i).integers(0, 4000, (40, 40)).astype(np.uint16) for i in range(6)]
    for i, row in enumerate(rows):
        Image.fromarray(row).save(tmp_path / f"{i}.png")
    paths = [[tmp_path / f"{i}.png"] for i in range(6)]
    seen = [[open_image(p, window=(0, 4000))] for (p,) in paths]
    texts = ["lung", "heart", "liver", "bone", "skin", "brain"]
    with pytest.raises(ValueError, match="greys of more than 8 bits"):
        embedders.fit_local(EmbedConfig(), texts, paths)
    plain = embedders.fit_local(EmbedConfig(), texts, seen)
    made = embedders.fit_local(EmbedConfig(window=(0, 4000)), texts, paths)
    assert made.name != plain.name  # other pictures would look other to it
    assert torch.equal(embed.embed_queries(made, texts, paths), embed.embed_queries(plain, texts, seen))
    with pytest.raises(
        ValueError, match=r"EmbedConfig.window must be \[black, white\] with black < white, got \[3, 2\]"
    ):
        EmbedConfig(window=(3, 2))


def test_local_of_little():
    one = embedders.fit_local(EmbedConfig(), ["heart"])
    assert embed.embed_queries(one, ["The HEART"]).tolist() == [[1.0]]
    assert embed.embed_queries(embedders.fit_local(EmbedConfig(), ["the heart"]), ["heart"]).shape == (1, 1)
    same = embedders.fit_local(EmbedConfig(), ["the heart"] * 4, [[p] for p in PICTURES[:2]] * 2)
    assert embed.embed_queries(same, ["heart"], [PICTURES[:1]]).shape == (
        1,
        2,
    )  # what does not vary has no component


def test_heads_that_do_not_fit():
    made = embedders.fit_local(EmbedConfig(dims=2), REPORTS)
    with pytest.raises(ValueError, match=r"head must be \[2, e\] like the vectors, got \[5, 4\]"):
        embed.embed_queries(embedders.with_head(made, torch.ones(5, 4)), REPORTS[:1])
    with pytest.raises(ValueError, match="finite floating point"):
        embedders.with_head(made, torch.full((2, 2), torch.inf))


def test_query_errors(models, tmp_path):
    words = embedders.fit_local(EmbedConfig(), REPORTS)
    both = embedders.fit_local(EmbedConfig(), REPORTS, [[p] for p in PICTURES[:4]])
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
        embedders.fit_local(EmbedConfig(), ["heart"], [PICTURES[:1]])
    with pytest.raises(ValueError, match="at least two different images, or none, got 2"):
        embedders.fit_local(EmbedConfig(), ["heart"], [[PICTURES[0], PICTURES[0]]])
    with pytest.raises(ValueError, match="must have words of two letters or more"):
        embedders.fit_local(EmbedConfig(), ["<image>", "a b"])
    with pytest.raises(ValueError, match="only for kind 'local', got 'text'"):
        embedders.fit_local(EmbedConfig(kind="text", name="bert"), REPORTS)
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
