"""embedders: what is saved is read again, another process gives the same vectors, changed files are refused."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from medvl.adapters import embed, embedders
from medvl.adapters.embed_config import EmbedConfig
from tests.adapters.tiny_encoders import PICTURES, REPORTS, TEXT, close, encoder, unit, write

QUERIES = ["<image>\n<image>\nIs the heart normal?", "No effusion, nodule", "<image>\nnodule left"]
SEEN = [PICTURES[:2], [], PICTURES[2:3]]


def test_local_rows_alone_and_saved_and_elsewhere(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, picture in zip(paths, PICTURES, strict=True):
        picture.save(path)
    made = embedders.fit_local(EmbedConfig(), REPORTS, [[p] for p in PICTURES[:4]])
    seen = [paths[:2], [], [str(paths[2])]]
    want = embed.embed_queries(made, QUERIES, seen)
    close(want.norm(dim=1), torch.ones(3))
    for i in range(3):
        assert torch.equal(embed.embed_queries(made, QUERIES[i : i + 1], seen[i : i + 1])[0], want[i])
    assert embedders.fit_local(EmbedConfig(), REPORTS, [[p] for p in paths[:4]]).name == made.name
    assert embedders.fit_local(EmbedConfig(), REPORTS[:3]).name != made.name
    embedders.save_embedder(embedders.with_head(made, torch.eye(want.shape[1])[:, :5]), tmp_path / "saved")
    again = embedders.read_embedder(tmp_path / "saved")
    assert again.name == embedders.with_head(made, torch.eye(want.shape[1])[:, :5]).name != made.name
    assert torch.equal(embed.embed_queries(again, QUERIES, seen), F.normalize(want[:, :5]))
    embedders.save_embedder(made, tmp_path / "bare")
    code = (
        "import sys, torch; from medvl.adapters import embed, embedders; folder, out, *paths = sys.argv[1:]; m = embedders.read_embedder(folder);"
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

    embedders.save_embedder(
        embedders.fit_local(EmbedConfig(), REPORTS, [[p] for p in PICTURES[:4]]), tmp_path / "saved"
    )
    state, about = (
        load_file(tmp_path / "saved/embedder.safetensors"),
        json.loads((tmp_path / "saved/embedder.json").read_text()),
    )
    change(state, about)
    save_file(state, tmp_path / "saved/embedder.safetensors", {"format": "pt"})
    (tmp_path / "saved/embedder.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"read_embedder: .*saved: .*{message}"):
        embedders.read_embedder(tmp_path / "saved")


def test_encoders_are_saved_by_name(models, tmp_path):
    made = embedders.with_head(encoder(models, "clip"), torch.randn(16, 4))
    embedders.save_embedder(made, tmp_path / "saved")
    assert (tmp_path / "saved/embedder.safetensors").stat().st_size < 1000
    again = embedders.read_embedder(tmp_path / "saved")
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


def test_open_and_read_errors(models, tmp_path):
    at = {kind: str(folder) for kind, (folder, _) in models.items()}
    with pytest.raises(ValueError, match="use fit_local"):
        embedders.open_embedder(EmbedConfig())
    with pytest.raises(ValueError, match=r"needs a clip or siglip model, .* is a bert"):
        embedders.open_embedder(EmbedConfig(kind="image_text", name=at["bert"]))
    with pytest.raises(ValueError, match=r"of text alone, .* is a clip"):
        embedders.open_embedder(EmbedConfig(kind="text", name=at["clip"]))
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(ValueError, match=r"of text alone, .* is a t5"):
        embedders.open_embedder(EmbedConfig(kind="text", name=str(tmp_path)))
    with pytest.raises(ValueError, match="there is no folder"):
        embedders.read_embedder(tmp_path / "nowhere")
    embedders.save_embedder(embedders.fit_local(EmbedConfig(), REPORTS), tmp_path / "saved")
    with pytest.raises(ValueError, match="is there already"):
        embedders.save_embedder(embedders.fit_local(EmbedConfig(), REPORTS), tmp_path / "saved")
    about = tmp_path / "saved/embedder.json"
    text = about.read_text()
    about.write_text(text.replace('"heart"', '"heaart"'))
    with pytest.raises(ValueError, match=r"but its content is local:.*the file was changed"):
        embedders.read_embedder(tmp_path / "saved")
    about.write_text(text.replace("medvl embedder 1", "medvl embedder 9"))
    with pytest.raises(ValueError, match="must be 'medvl embedder 1'"):
        embedders.read_embedder(tmp_path / "saved")
    about.write_text(text.replace('"dims"', '"dim"'))
    with pytest.raises(ValueError, match="unknown key 'dim'"):
        embedders.read_embedder(tmp_path / "saved")
    about.write_text(text)
    weights = tmp_path / "saved/embedder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="broken or cut off"):
        embedders.read_embedder(tmp_path / "saved")


def test_an_encoder_with_other_weights_is_not_taken(tmp_path):
    config = {**TEXT, "max_position_embeddings": 64, "pad_token_id": 2}
    write(tmp_path / "bert", "bert", **config)
    made = embedders.open_embedder(EmbedConfig(kind="text", name=str(tmp_path / "bert")))
    embedders.save_embedder(made, tmp_path / "saved")
    assert embedders.read_embedder(tmp_path / "saved").name == made.name
    for path in (tmp_path / "bert").iterdir():
        path.unlink()
    write(tmp_path / "bert", "bert", std=0.3, **config)
    with pytest.raises(ValueError, match=r"its content is text:bert:.*the encoder .*bert was changed"):
        embedders.read_embedder(tmp_path / "saved")
