"""The check before a training lists all that is wrong with the features it needs, in a folder or in a store."""

import json

import h5py
import numpy as np
import pytest
import torch

from medvl.commands import slides as commands
from medvl.slides.check import check_slides, describe
from medvl.slides.pack import pack
from tests.slides.test_features import features, grid, write_csv, write_trident
from tests.slides.test_pack import D, files_of


def test_a_check_without_questions_looks_at_everything(folder, tmp_path, capsys):
    source, made = folder
    assert commands.check_or_pack("check", str(source), (), "", 0, "", False) == 0
    assert "4 of 4 slides found, 25 patches" in capsys.readouterr().out
    x = made["S3"][0].copy()
    x[2] = np.nan
    (source / "more").mkdir()
    np.save(source / "more" / "S3.npy", x)  # of a name that is there, and bad
    assert commands.check_or_pack("check", str(source), (), "", 0, "", False) == 3
    out = capsys.readouterr().out
    assert "5 of 5 slides found" in out
    assert "1 with NaN or infinity: " in out
    pack(files_of(source)[:4], tmp_path / "s.h5", encoder="uni_v1")
    assert commands.check_or_pack("check", str(tmp_path / "s.h5"), (), "", 0, "", False) == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no patch features"):
        commands.check_or_pack("check", str(tmp_path / "empty"), (), "", 0, "", False)
    with pytest.raises(ValueError, match=r"empty: holds no patch features"):
        commands.check_or_pack("pack", str(tmp_path / "empty"), (), str(tmp_path / "new.h5"), 0, "", False)
    assert not (tmp_path / "new.h5").exists()


def test_a_check_goes_on_behind_a_malformed_record(folder, tmp_path, capsys):
    source, _ = folder
    good = {"slide_id": "S0", "question": "Which?", "answer": "fat"}
    (tmp_path / "a.json").write_text(
        json.dumps([good, {"slide_id": "S1"}, good | {"slide_id": "S2"}, good | {"slide_id": "none"}])
    )
    (tmp_path / "b.json").write_text("[")
    assert (
        commands.check_or_pack(
            "check", str(source), (str(tmp_path / "b.json"), str(tmp_path / "a.json")), "", 0, "", False
        )
        == 3
    )
    out = capsys.readouterr().out
    assert f"cannot be read: {tmp_path / 'b.json'}: neither JSON nor a CSV" in out
    assert "a.json: 1 faulty records\n  2: must be an object with the texts slide_id, question, answer" in out
    assert "2 of 3 slides found" in out
    assert f"1 missing: none ({tmp_path / 'a.json'}, record 4)" in out


def test_everything_that_is_wrong_is_listed(folder, tmp_path):
    source, made = folder
    np.save(source / "wide.npy", features(3, D + 1))
    x = made["S3"][0].copy()
    x[[2, 5]] = np.inf
    np.save(source / "bad.8C.npy", x)
    np.save(source / "vector.npy", x[0])
    torch.save(x, source / "pickled.pt")
    (source / "S2.csv").write_text("0.1\n")
    write_trident(source / "virchow.h5", features(3, D), grid(3))
    with h5py.File(source / "virchow.h5", "r+") as f:
        f["features"].attrs["encoder"] = "virchow"
    np.save(source / "nobody.npy", x)
    names = ["./T/S0.csv", "S1", "S2", "S3", "wide", "bad", "vector", "pickled", "virchow", "S", "none"]
    found = check_slides(source, {n: f"a.json, line {i}" for i, n in enumerate(names, 1)})
    assert (found.requested, found.usable, found.dims, found.encoder, found.unknown, found.ok) == (
        11,
        6,
        D,
        "uni_v1",
        1,
        False,
    )
    assert found.missing == {"S": "a.json, line 10", "none": "a.json, line 11"}
    assert found.duplicates == {"S2": [str(source / "S2.csv"), str(source / "S2.h5")]}
    assert found.unreadable.keys() == {"vector", "pickled"}
    assert found.wrong_dims == {"wide": D + 1}
    assert found.wrong_encoder == {"virchow": "virchow"}
    assert found.bad_patches == {"bad": (2, 2)}
    assert found.empty == ("S1",)
    assert found.patches == 11 + 9 + 3 + 9 + 3
    text = "\n".join(describe(found))
    for line in (
        "6 of 11 slides found, 35 patches, 6 features each of uni_v1; 1 files are not asked for",
        "2 missing: S (a.json, line 10) (near: S",
        "1 found more than once: S2 (",
        "2 unreadable: ",
        "1 with another number of features: wide (7)",
        "1 of another encoder: virchow (virchow)",
        "1 with NaN or infinity: bad (2 patches, first 2)",
        "1 without a patch: S1",
    ):
        assert line in text
    assert not check_slides(source, {"bad": ""}, values=False).bad_patches
    assert check_slides(source, {"S0": ""}, dims=9, encoder="x").wrong_dims == {"S0": D}
    assert check_slides(source, {"S0": ""}, dims=9, encoder="x").wrong_encoder == {"S0": "uni_v1"}
    good = check_slides(source, {"S0": "", "S1": "", "S3": ""}, dims=D)
    assert good.ok
    assert describe(good)[1:] == ["1 without a patch: S1"]
    with pytest.raises(ValueError, match="no such file"):
        check_slides(source / "none", {})


def test_the_check_of_a_store_sees_what_changed_in_it(folder, tmp_path):
    source, _ = folder
    pack(files_of(source), tmp_path / "s.h5", encoder="uni_v1")
    found = check_slides(tmp_path / "s.h5", {"S0": "", "./S2.csv": "", "none": "x"}, dims=D)
    assert (found.usable, found.missing, found.unknown, found.unreadable) == (2, {"none": "x"}, 2, {})
    with h5py.File(tmp_path / "s.h5", "r+") as f:
        f["features"][12, 0] = 3.0
    found = check_slides(tmp_path / "s.h5", {"S0": "", "S2": ""})
    assert found.unreadable.keys() == {"S2"}
    assert "its digest differs" in found.unreadable["S2"]
    assert check_slides(tmp_path / "s.h5", {"S0": "", "S2": ""}, values=False).ok


def test_a_csv_whose_features_must_be_told(tmp_path):
    write_csv(tmp_path / "a.csv", features(3, 514), header=False)
    assert "Give dims=512" in check_slides(tmp_path, {"a": ""}).unreadable["a"]
    assert check_slides(tmp_path, {"a": ""}, dims=512).ok


def test_real_files(shared_data):
    folder = shared_data / "pathology" / "gigapath"
    records = json.loads((shared_data / "pathology" / "slidechat_train_data_example.json").read_text())
    requested = {record["image"][0]: record["id"] for record in records}
    assert check_slides(folder, requested).missing == requested
    assert "prov_normal_000_1" in check_slides(folder, {"prov_normal_000_1": "here"}).duplicates
