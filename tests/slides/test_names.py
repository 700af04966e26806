"""A name finds its slide and no other; a case finds all its slides."""

import json

import pytest

from medvl.slides.names import case_of, feature_files, find_slides, near_names, slide_name

NAME = "TCGA-GV-A40G-01Z-00-DX1.8288CA92-B611-4ACF-986E-0B8A3F620B94"


def test_cases():
    assert case_of("TCGA-GV-A40G-01Z-00-DX1.8288ca92") == "TCGA-GV-A40G"
    assert (case_of("12"), case_of("TCGA-GV-A40G")) == ("12", "TCGA-GV-A40G")


def test_names():
    for name in ("./BLCA/A-DX1.csv", "A-DX1.h5", "BLCA\\A-DX1.PT", "A-DX1", "/x/A-DX1.svs", "A-DX1.svs.h5"):
        assert slide_name(name) == "A-DX1"
    assert slide_name(f"TCGA-LUSC/{NAME}.pt") == NAME
    assert slide_name("../.hidden/./..a.csv") == "..a"  # a prefix is not a set of characters
    assert slide_name(1058) == "1058"
    assert slide_name(".csv") == ".csv"


def stems_of(name, stems):
    return find_slides([name], {stem: [stem] for stem in stems})[name].stems


def test_dx1_is_not_dx10():
    stems = ["A-DX10.4F", "A-DX1.8C.9", "A-DX2", "B-DX10"]
    assert stems_of("./T/A-DX1.csv", stems) == ("A-DX1.8C.9",)
    assert stems_of("A-DX1.8C", stems) == stems_of("A-DX1.8C.9", stems) == ("A-DX1.8C.9",)
    assert stems_of("A-DX10", stems) == ("A-DX10.4F",)
    assert stems_of("A-DX2", [*stems, "A-DX2.1"]) == ("A-DX2",)  # the whole name wins
    assert stems_of("A-DX3", [*stems, "A-DX3.1", "A-DX3.2"]) == ("A-DX3.1", "A-DX3.2")
    for name, near in (
        ("B-DX1", " (near: B-DX10"),
        ("A", " (none of 4 is near)"),
        ("a-dx1.8c", " (near: A-DX1.8C.9"),
    ):
        assert stems_of(name, stems) == ()  # another case is offered, not taken
        assert near_names(name, stems).startswith(near)


def test_a_case_is_all_its_slides():
    first, second, other = f"{NAME}", "TCGA-GV-A40G-01Z-00-DX2.77", "TCGA-GV-A40H-01Z-00-DX1.1"
    known = {stem: [stem] for stem in (first, second, other)}
    found = find_slides(["TCGA-GV-A40G", "TCGA-GV-A40H", "TCGA-GV-A40", "TCGA-GV-A40G-01Z-00-DX2"], known)
    assert [m.places for m in found.values()] == [(first, second), (other,), (), (second,)]
    assert all(m.clear for m in found.values())
    assert near_names("TCGA-GV-A40J", known).startswith(" (near: TCGA-GV-A40")


def test_paths_that_are_written_decide(tmp_path):
    for name in ("BLCA/X.csv", "BRCA/X.csv", "h5_files/Y.8C.h5", "pt_files/Y.8C.pt", "Z.pt", "Z.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    asked = {
        "./BLCA/X.csv": "BLCA/X.csv",
        "BRCA\\X.csv": "BRCA/X.csv",
        "BRCA/X.h5": "BRCA/X.csv",  # of another kind, in that folder
        "feat/BRCA/X.csv": None,
        "X": None,
        "h5_files/Y.h5": "h5_files/Y.8C.h5",
        "Y": None,
        "Z.pt": "Z.pt",
        "Z": None,
        str(tmp_path / "Z.h5"): "Z.h5",
        "x" * 5000 + ".h5": None,
    }
    found = find_slides(asked, feature_files(tmp_path), tmp_path)
    for name, path in asked.items():
        if path is None:
            assert len(found[name].places) != 1, name
        else:
            assert found[name].clear
            assert found[name].places == (tmp_path / path,)


def test_finding_files(tmp_path):
    for name in (
        "BLCA/A-DX1.8C.h5",
        "BLCA/A-DX10.4F.h5",
        "LUSC/B-DX1.pt",
        "LUSC/._B-DX1.pt",
        "LUSC/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_slides(["./BLCA/A-DX1.csv", "B-DX1", "B-DX2"], feature_files(tmp_path), tmp_path)
    places = {name: match.places for name, match in found.items()}
    assert places == {
        "./BLCA/A-DX1.csv": (tmp_path / "BLCA/A-DX1.8C.h5",),
        "B-DX1": (tmp_path / "LUSC/B-DX1.pt",),
        "B-DX2": (),
    }
    assert list(feature_files(tmp_path)) == ["A-DX1.8C", "A-DX10.4F", "B-DX1"]
    (tmp_path / "LUSC/A-DX1.99.h5").touch()
    (tmp_path / "LUSC/B-DX1.h5").touch()
    found = find_slides(["A-DX1", "B-DX1"], feature_files(tmp_path), tmp_path)
    assert found["A-DX1"].stems == ("A-DX1.8C", "A-DX1.99")
    assert found["B-DX1"].places == (tmp_path / "LUSC/B-DX1.h5", tmp_path / "LUSC/B-DX1.pt")
    assert not any(match.clear for match in found.values())
    with pytest.raises(ValueError, match="no such folder"):
        feature_files(tmp_path / "none")


def test_real_names(shared_data):
    asked = [
        r["image"][0]
        for r in json.loads((shared_data / "pathology" / "slidechat_train_data_example.json").read_text())
    ]
    stems = [slide_name(a) + end for a in dict.fromkeys(asked) for end in (".8288CA92-B611", "0.9999-0000")]
    for name in asked:
        assert stems_of(name, stems) == (name.removesuffix(".csv") + ".8288CA92-B611",)
    one = json.loads((shared_data / "pathology" / "wsi_bench" / "1_Report_test.json").read_text())[0]["image"]
    assert stems_of(one, [NAME, slide_name(one)]) == (one.split("/")[1].removesuffix(".pt"),)
