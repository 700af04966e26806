"""A run as safetensors: transformers opens its towers, and it is read back as the run."""

import json

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from medvl.base import config
from medvl.base.tree import flatten
from medvl.components import encode
from medvl.hub import saving, skeletons, tokens
from medvl.systems.ct_clip import common_space, export, model
from medvl.systems.ct_clip import run as ct_clip_run
from tests.gpu import cases
from tests.hub.pieces import TINY

TEXTS = ["There is a nodule.", "No pleural effusion."]


def made(folder, *, named=False, **settings):
    """(model, params) of a run whose weights are random, in a folder with its record."""
    cfg = cases.ct_clip_model(**settings)[0].cfg
    cfg = evolve(cfg, words=evolve(cfg.words, tower=evolve(cfg.words.tower, vocabulary=300)))
    if named:
        encoder = skeletons.init_skeleton(TINY["clip_text"] | {"vocab_size": 300}, torch.Generator())
        saving.save_skeleton(*encoder, folder / "words")
        tokens.train_bpe(TEXTS, 300, folder / "words/tokenizer")
        words = {
            "encoder": str(folder / "words"),
            "tokenizer": str(folder / "words/tokenizer"),
            "pool": "mean",
        }
        cfg = evolve(cfg, words=evolve(cfg.words, **words))
    (folder / "results").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.unstructure(cfg)))
    (folder / "results/thresholds.json").write_text('{"Lung nodule": 0.5}')
    of, params = model.init_model(cfg, folder, TEXTS)
    widths = {
        "image": params["project"]["image"]["weight"].shape[1],
        "text": params["project"]["text"]["weight"].shape[1],
    }
    gen = torch.Generator().manual_seed(2)
    return of, params | {
        "running": {side: {"mean": torch.randn(n, generator=gen)} for side, n in widths.items()}
    }


@pytest.mark.parametrize("named", [False, True])
def test_what_is_written_is_the_run(tmp_path, named):
    from transformers import AutoModel

    of, params = made(tmp_path / "run", named=named)
    (tmp_path / "out").mkdir()
    bases = export.export(of, params, tmp_path / "run", tmp_path / "out")
    assert set(bases.values()) == ({"", str(tmp_path / "run/words")} if named else {""})
    again, weights = ct_clip_run.load(tmp_path / "out")
    assert again.cfg == of.cfg
    for name, leaf in flatten(params).items():
        assert torch.equal(leaf, flatten(weights)[name])
    batch = cases.ct_batch()
    with torch.no_grad():
        assert torch.equal(
            common_space.place_batch(of, params, batch), common_space.place_batch(again, weights, batch)
        )
        rows = common_space.place_batch(of, params, batch)
        asked = [
            common_space.finding_probabilities(*one, rows, ("Lung nodule",))
            for one in ((of, params), (again, weights))
        ]
        assert torch.equal(*asked)
        pixels = encode.windows(of.cfg.encode, batch["slices"][0])
        theirs = AutoModel.from_pretrained(tmp_path / "out/vision").eval()(pixels).last_hidden_state
        torch.testing.assert_close(of.vit(params["vit"], pixels).last_hidden_state, theirs)
        if named:
            theirs = AutoModel.from_pretrained(tmp_path / "out/text").eval()(batch["ids"][:, 0])
            rows = of.text_encoder(params["text"], input_ids=batch["ids"][:, 0])
            torch.testing.assert_close(rows.last_hidden_state, theirs.last_hidden_state)
    assert (tmp_path / "out/results/thresholds.json").read_text() == '{"Lung nodule": 0.5}'
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert names >= {
        "config.json",
        "rest.safetensors",
        "vision/model.safetensors",
        "tokenizer/tokenizer.json",
    }
    assert not [name for name in names if name.endswith((".pt", ".lock", ".tmp"))]


def test_rows_that_are_not_normalised_have_no_running_means(tmp_path):
    of, params = made(tmp_path / "run", contrast__normalise="none")
    (tmp_path / "out").mkdir()
    export.export(of, params | {"running": {}}, tmp_path / "run", tmp_path / "out")
    assert ct_clip_run.load(tmp_path / "out")[1]["running"] == {}


def test_what_is_read_back_as_another_model_is_not_kept(tmp_path, monkeypatch):
    of, params = made(tmp_path / "run")
    other = {**params, "vit": {name: leaf + 1e-3 for name, leaf in params["vit"].items()}}
    monkeypatch.setattr(export, "load_exported", lambda cfg, folder: (of, other))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is read back as another model than was written; nothing is kept"):
        export.export(of, params, tmp_path / "run", tmp_path / "out")
    broken = {**params, "contrast": {"log_scale": torch.tensor(torch.nan), "bias": torch.tensor(0.0)}}
    (tmp_path / "nan").mkdir()
    with pytest.raises(ValueError, match="contrast/log_scale must be finite"):
        export.export(of, broken, tmp_path / "run", tmp_path / "nan")


def test_a_folder_whose_files_do_not_belong_together_is_refused(tmp_path):
    of, params = made(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    export.export(of, params, tmp_path / "run", out)
    whole = load_file(out / export.REST)
    for change, match in (
        ({"fuse/cls": None}, r"not of the run that config.json describes: missing fuse/cls"),
        ({"fuse/cls": torch.zeros(3)}, r"of another shape fuse/cls \[3\]"),
        ({"vit/x": torch.zeros(3)}, "unexpected vit/x"),
    ):
        save_file({n: t for n, t in (whole | change).items() if t is not None}, out / export.REST)
        with pytest.raises(ValueError, match=match):
            ct_clip_run.load(out)
    (out / export.REST).write_bytes((out / export.REST).read_bytes()[:-9])
    with pytest.raises(ValueError, match="is broken or cut off"):
        ct_clip_run.load(out)
    # The slice encoder of another run.
    save_file(whole, out / export.REST)
    for path in (out / "vision").iterdir():
        path.unlink()
    (out / "vision").rmdir()
    saving.save_skeleton(
        *skeletons.init_skeleton(TINY["vit"] | {"hidden_size": 32}, torch.Generator()), out / "vision"
    )
    with pytest.raises(ValueError, match=r"fuse.dim must be the width of the slice encoder, 32, found 64"):
        ct_clip_run.load(out)
