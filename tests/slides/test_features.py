"""Patch features in the layouts that CLAM, TRIDENT, Prov-GigaPath, DSMIL and SlideChat write are read as they were meant."""

import os
import pickle
import zipfile

import h5py
import numpy as np
import pytest
import torch

from medvl.slides import csv_features
from medvl.slides import features as slides
from medvl.slides.features import about_slide, chunks, read_slide

NAME = "TCGA-GV-A40G-01Z-00-DX1.8288CA92-B611-4ACF-986E-0B8A3F620B94"


def features(n=11, d=6, dtype="f4", seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def grid(n, step=256, columns=4):
    return np.stack([np.arange(n) % columns, np.arange(n) // columns], 1) * step + 1000


def write_clam(path, x, xy):
    """CLAM h5_files: float32 and int32, resizable, chunks (32, d), no attributes."""
    with h5py.File(path, "w") as f:
        f.create_dataset("features", data=x, maxshape=(None, x.shape[1]), chunks=(32, x.shape[1]))
        f.create_dataset("coords", data=xy.astype("i4"), maxshape=(None, 2), chunks=(32, 2))


def write_trident(path, x, xy, patch_size_level0=512, **attrs):
    """TRIDENT: chunks (1, d), everything known in attributes, None as text."""
    with h5py.File(path, "w") as f:
        chunk = (1, *x.shape[1:]) if len(x) else None
        held = f.create_dataset(
            "features", data=x, chunks=chunk, maxshape=(None, *x.shape[1:]) if chunk else None
        )
        held.attrs.update({"name": "s", "savetodir": "/out", "encoder": "uni_v1"})
        own = {
            "patch_size": 256,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 0,
            "savetodir": "None",
        }
        own |= {"patch_size_level0": patch_size_level0} if patch_size_level0 else {}
        f.create_dataset("coords", data=xy.astype("i8")).attrs.update(own | attrs)


def write_csv(path, x, header=True, tail="", index=False, names=None):
    """`DataFrame(x).to_csv(index=False, float_format="%.4f")`; `tail` is a cell behind every row, its column is called location."""
    rows = [[f"{v:.4f}" for v in row] + ([tail] if tail else []) for row in x]
    if header:
        rows.insert(0, list(names or map(str, range(x.shape[1]))) + (["location"] if tail else []))
    if index:
        rows = [[("" if header else "0") if i == 0 else str(i - 1), *row] for i, row in enumerate(rows)]
    path.write_text("".join(",".join(row) + "\n" for row in rows), encoding="utf-8")


def same(path, x, xy=None, **known):
    """Whole, in pieces and by its description the file is x and xy."""
    slide, about = read_slide(path), about_slide(path)
    parts = list(chunks(path, 4))
    for got in (slide.features, np.concatenate([p[0] for p in parts])):
        assert got.dtype == slide.dtype == about.dtype
        np.testing.assert_array_equal(got, x)
    assert [len(p[0]) for p in parts] == [4] * (len(x) // 4) + [len(x) % 4] * (len(x) % 4 > 0)
    if xy is None:
        assert slide.coords is None
        assert not about.has_coords
        assert all(p[1] is None for p in parts)
    else:
        for got in (slide.coords, np.concatenate([p[1] for p in parts])):
            assert got.dtype == np.int64
            np.testing.assert_array_equal(got, xy)
    assert (about.rows, about.dims) == x.shape
    for key, value in known.items():
        assert getattr(slide, key) == value, key
    return slide, about


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_trident(tmp_path, dtype):
    x, xy = features(dtype=dtype), grid(11, 512)
    write_trident(tmp_path / f"{NAME}.h5", x, xy)
    slide, about = same(
        tmp_path / f"{NAME}.h5",
        x,
        xy,
        name=NAME,
        patch_size=512,
        magnification=20.0,
        encoder="uni_v1",
        mpp=None,
    )
    assert slide.dtype == np.dtype(dtype)
    assert (about.patch_size, about.magnification, about.encoder, about.name) == (512, 20.0, "uni_v1", NAME)


def test_what_trident_does_not_know_is_unknown(tmp_path, caplog):
    x, xy = features(), grid(11, 512)
    write_trident(
        tmp_path / "a.h5",
        x,
        xy,
        patch_size_level0=0,
        level0_magnification="None",
        target_magnification="None",
        mpp=0.25,
    )
    _, about = same(tmp_path / "a.h5", x, xy, patch_size=512, magnification=None, mpp=0.25)
    assert about.patch_size is None  # it reads no coordinates
    assert "a.h5: does not give its patch size; taken as 512 level-0 pixels" in caplog.text
    write_trident(tmp_path / "b.h5", x, xy, target_magnification="x20")
    with pytest.raises(ValueError, match=r"b.h5: target_magnification must be a number, got 'x20'"):
        about_slide(tmp_path / "b.h5")


def test_clam(tmp_path, caplog):
    x, xy = features(70), grid(70)
    write_clam(tmp_path / "a.h5", x, xy)
    same(tmp_path / "a.h5", x, xy, patch_size=256, magnification=None, encoder="", mpp=None)
    assert "taken as 256" in caplog.text


@pytest.mark.parametrize(
    ("attrs", "size"),
    [
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 1024),
        ({"patch_size": 256, "patch_level": 1, "downsample": np.array([4.000122, 4.000204])}, 1024),
        ({"patch_size": 256, "patch_level": 0, "downsample": (1.0, 1.0)}, 256),
        ({"patch_size": 256, "patch_level": 0}, 256),
        ({"patch_size": 256, "level0_magnification": 40, "target_magnification": 20}, 512),
        ({"patch_size": 256, "patch_level": 1}, None),  # of a level whose size is not said
        ({"patch_size": 256}, None),
    ],
)
def test_the_patch_size_that_clam_and_trident_write(tmp_path, attrs, size):
    """Neighbours' distances would halve it where patches overlap by a half, and one patch has no neighbour."""
    for xy in (grid(70, 128), grid(1)):
        write_clam(tmp_path / "a.h5", features(len(xy)), xy)
        with h5py.File(tmp_path / "a.h5", "r+") as f:
            f["coords"].attrs.update(attrs)
        assert about_slide(tmp_path / "a.h5").patch_size == size
        guess = 128 if len(xy) > 1 else None
        assert read_slide(tmp_path / "a.h5").patch_size == (guess if size is None else size)


def test_patch_sizes_that_are_none(tmp_path):
    for attrs, what in (
        (
            {"patch_size": 256, "downsample": (4.0, 2.0)},
            r"downsample must be one number, or the same for x and y, got \[4. 2.\]",
        ),
        ({"patch_size": 256, "downsample": 1e-9}, "a patch must have a side of 1 level-0 pixel or more"),
        ({"patch_size": "big", "downsample": 1.0}, "patch_size must be a number, got 'big'"),
    ):
        write_clam(tmp_path / "a.h5", features(3), grid(3))
        with h5py.File(tmp_path / "a.h5", "r+") as f:
            f["coords"].attrs.update(attrs)
        with pytest.raises(ValueError, match=f"a.h5: {what}"):
            about_slide(tmp_path / "a.h5")


def write_stamp(path, x, xy, mpp=0.0, **attrs):
    """STAMP 2: "feats" in float16, upper left corners in micrometres."""
    with h5py.File(path, "w") as f:
        f["feats"], f["coords"] = x.astype("f2"), (xy * 0.25).astype("f4")
        f.attrs.update(
            {"extractor": "uni2", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224} | attrs
        )
        if mpp:
            f.attrs["mpp"] = mpp


def test_stamps_micrometres_are_no_pixels(tmp_path, caplog):
    x, xy = features(dtype="f2"), grid(11, 1024)
    write_stamp(tmp_path / "a.h5", x, xy, mpp=0.25)
    same(tmp_path / "a.h5", x, xy, patch_size=1024, mpp=0.25, encoder="uni2")
    write_stamp(tmp_path / "b.h5", x, xy)
    same(tmp_path / "b.h5", x, None, patch_size=None)
    assert caplog.text.count("b.h5: coords are in micrometres and the file does not say the slide's mpp") == 1
    with h5py.File(tmp_path / "b.h5", "r+") as f:
        del f.attrs["unit"]  # as older STAMP
    same(tmp_path / "b.h5", x, None, patch_size=None)
    write_stamp(tmp_path / "c.h5", x, xy, unit="inch")
    with pytest.raises(ValueError, match=r"c.h5: the unit of coords must be px or um, got 'inch'"):
        about_slide(tmp_path / "c.h5")


def test_gigapath_tiles(tmp_path):
    x, xy = features(), grid(11)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["tile_embeds"], f["coords"] = x, xy.astype("f4")
    same(tmp_path / "a.h5", x, xy)
    with h5py.File(tmp_path / "a.h5", "r+") as f:
        f["coords"][3] = (0.25, 0.5)
    with pytest.raises(
        ValueError, match=r"coords must be whole level-0 pixels, got \[0.25, 0.5\] for patch 3"
    ):
        read_slide(tmp_path / "a.h5")


@pytest.mark.parametrize(
    "kind",
    ["bare", "features", "feature", "feat", "feats", "embeddings", "batch", "coords", "old", "parameter"],
)
def test_pytorch(tmp_path, kind):
    x, xy = features(), grid(11)
    t = torch.from_numpy(x)
    held = {
        "bare": t,
        "batch": t[None],
        "coords": {"features": t, "coords": torch.from_numpy(xy), "patch_size_level0": 256},
    }
    held |= {"old": t, "parameter": torch.nn.Parameter(t)}
    path = tmp_path / "a.pt"
    torch.save(held.get(kind, {kind: t}), path, _use_new_zipfile_serialization=kind != "old")
    same(path, x, xy if kind == "coords" else None, **({"patch_size": 256} if kind == "coords" else {}))


@pytest.mark.parametrize(("stored", "read"), [("float16", "f2"), ("bfloat16", "f4"), ("float64", "f4")])
def test_number_types_of_pytorch(tmp_path, stored, read):
    t = torch.from_numpy(features()).to(getattr(torch, stored))
    torch.save(t, tmp_path / "a.pth")
    slide, _ = same(
        tmp_path / "a.pth", t.to(getattr(torch, {"f2": "float16", "f4": "float32"}[read])).numpy()
    )
    assert slide.dtype == np.dtype(read)


class _Evil:
    def __reduce__(self):
        return (open, ("/nonexistent/was_run", "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_pickle_is_ever_run(tmp_path):
    x = features()
    torch.save(x, tmp_path / "n.pt")  # TRIDENT's .pt
    with pytest.raises(
        ValueError, match=r"n.pt: holds a NumPy array pickled by torch.save.*weights_only=False"
    ) as e:
        read_slide(tmp_path / "n.pt")
    exec(str(e.value).split('python -c "')[1].rstrip('"'))  # what the message says to do
    same(tmp_path / "n.pt", x)
    torch.save({"features": x, "mpp": 0.25, "who": np.float64(3), "about": {1}}, tmp_path / "d.pt")
    with pytest.raises(ValueError, match=r"d.pt: holds .*weights_only=False") as e:
        read_slide(tmp_path / "d.pt")
    exec(str(e.value).split('python -c "')[1].rstrip('"'))
    same(tmp_path / "d.pt", x, mpp=0.25)
    torch.save(_Evil(), tmp_path / "e.pt")
    (tmp_path / "p.pt").write_bytes(pickle.dumps(_Evil()))
    for name in ("e.pt", "p.pt"):
        with pytest.raises(ValueError, match="holds Python objects"):
            read_slide(tmp_path / name)
    np.save(
        tmp_path / "o.npy", np.array({"feature": x}, dtype=object), allow_pickle=True
    )  # GTEx-TCGA-Embeddings
    np.save(tmp_path / "q.npy", np.array([_Evil()], dtype=object), allow_pickle=True)
    for name in ("o.npy", "q.npy"):
        with pytest.raises(ValueError, match=r"holds Python objects.*allow_pickle=True\)"):
            read_slide(tmp_path / name)
    with pytest.raises(ValueError, match=r"o.npy: holds Python objects") as e:
        about_slide(tmp_path / "o.npy")
    exec(str(e.value).split("such as by ")[1], {"np": np})
    same(tmp_path / "o.npy", x)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_numpy(tmp_path, dtype):
    x = features().astype(dtype)
    np.save(tmp_path / "a.npy", np.asfortranarray(x))
    slide, _ = same(tmp_path / "a.npy", x.astype("f2" if dtype == "f2" else "f4"))
    assert slide.dtype.isnative
    np.save(tmp_path / "a.npy", x[None])
    same(tmp_path / "a.npy", x.astype("f2" if dtype == "f2" else "f4"))


# CSV ------------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tail", ["", "3_17.jpeg", '"(3, 17)"', "é"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("d", [1, 2, 6, 512])
def test_csv(tmp_path, d, header, tail):
    """The header row 0..511 is no patch, and what stands behind the features is no feature."""
    x = np.round(features(9, d), 4)
    write_csv(tmp_path / "a.csv", x, header, tail)
    if d > 1 or not header:  # one column called 0 could be a patch
        same(tmp_path / "a.csv", x)


def test_csv_of_other_tools(tmp_path):
    x = np.round(features(9, 12), 4)
    for names in ([f"feat_{i}" for i in range(12)], [f"x{i + 1}" for i in range(12)], list("abcdefghijkl")):
        write_csv(tmp_path / "a.csv", x, True, "p.png", names=names)
        same(tmp_path / "a.csv", x)
    write_csv(tmp_path / "a.csv", x, index=True)  # to_csv without index=False
    same(tmp_path / "a.csv", x)
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode())
    same(tmp_path / "a.csv", x)


@pytest.mark.parametrize(("start", "quoted"), [(0, False), (1, False), (1, True)])
@pytest.mark.parametrize("name", [None, "", "index", "Unnamed: 0"])
@pytest.mark.parametrize(("n", "d"), [(9, 512), (9, 12), (2, 512), (1, 512)])
def test_an_index_of_the_rows_is_no_feature(tmp_path, caplog, n, d, name, start, quoted):
    """DataFrame.to_csv(header=False), or with a header whose first cell names the index or not."""
    path, x = tmp_path / "a.csv", np.round(features(n, d), 4)
    rows = [
        [f'"{i + start}"' if quoted else str(i + start), *(f"{v:.4f}" for v in row)]
        for i, row in enumerate(x)
    ]
    header = [] if name is None else [[name, *(f"f{i}" for i in range(d))]]
    path.write_text("".join(",".join(row) + "\n" for row in [*header, *rows]))
    for dims in (0, d):
        np.testing.assert_array_equal(read_slide(path, dims=dims).features, x)
    assert (
        "a.csv: the first column counts the rows: it is an index and no feature, and is left out"
        in caplog.text
    )


def test_a_first_feature_that_only_looks_like_an_index(tmp_path):
    x = np.round(features(9, 12), 4)
    x[:, 0] = np.arange(9)
    x[8, 0] = 4
    (tmp_path / "a.csv").write_text("".join(",".join(f"{v:g}" for v in row) + "\n" for row in x))
    np.testing.assert_allclose(read_slide(tmp_path / "a.csv").features, x, atol=1e-4)


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(
    "leading",
    [
        lambda n: [[256 * i, 0] for i in range(n)],
        lambda n: [[3 * i] for i in range(n)],
        lambda n: [[f"{n - i}.0"] for i in range(n)],
    ],
    ids=["places", "chosen rows", "backwards"],
)
def test_places_and_row_numbers_in_front_are_no_features(tmp_path, leading, header):
    """To say how wide the features are would make the first of them a place or a row number."""
    x = np.round(features(9, 512), 4)
    rows = [[*more, *row] for more, row in zip(leading(9), x, strict=True)]
    names = [*["x", "y"][: len(rows[0]) - 512], *(f"f{i}" for i in range(512))]
    write_rows = lambda rows: "".join(",".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / "a.csv").write_text(write_rows([names] * header + rows))
    for dims in (0, 512):
        with pytest.raises(
            ValueError, match=r"hold whole numbers such as .*: row numbers or coordinates, not features"
        ):
            read_slide(tmp_path / "a.csv", dims=dims)
    behind = [[*row[-512:], *row[:-512]] for row in rows]
    (tmp_path / "b.csv").write_text(write_rows(behind))
    np.testing.assert_allclose(read_slide(tmp_path / "b.csv", dims=512).features, x, atol=1e-4)


def test_a_csv_is_read_once_to_count_its_rows(tmp_path, monkeypatch):
    path, reads, lines = tmp_path / "a.csv", [], csv_features._lines
    write_csv(path, np.round(features(9, 12), 4))
    monkeypatch.setattr(csv_features, "_lines", lambda path: reads.append(path) or lines(path))
    about_slide(path)
    about_slide(path)
    list(chunks(path, 4))
    assert len(reads) == 2  # to count, and to read
    write_csv(path, np.round(features(5, 12), 4))  # another file
    assert about_slide(path).rows == 5


def test_line_ends_and_lines_without_end(tmp_path):
    path, x = tmp_path / "a.csv", np.round(features(9, 12), 4)
    write_csv(path, x)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    same(path, x)
    path.write_text("0.5,0.5\0,0.5\n" + "0.5,0.5,0.5\n" * 3)
    with pytest.raises(ValueError, match=r"a.csv: line 1 has a NUL byte; the file is damaged"):
        about_slide(path)
    path.write_text("0.5," * 10**6)
    with pytest.raises(
        ValueError, match=r"a.csv: line 1 has 2097152 characters or more; a line is one patch"
    ):
        about_slide(path)
    write_csv(path, x, tail='"p.png')
    with pytest.raises(ValueError, match=r"a.csv: "):
        read_slide(path)


@pytest.mark.parametrize("header", [True, False])
def test_numbers_behind_the_features_of_a_csv(tmp_path, header):
    """x and y behind 512 features: it cannot be told what they are, so it must be said."""
    x = np.round(features(5, 514), 4)
    write_csv(tmp_path / "a.csv", x, header)
    with pytest.raises(
        ValueError, match=r"has 514 columns of numbers; are 2 of them not features. Give dims=512 or dims=514"
    ):
        read_slide(tmp_path / "a.csv")
    np.testing.assert_array_equal(read_slide(tmp_path / "a.csv", dims=512).features, x[:, :512])
    np.testing.assert_array_equal(next(chunks(tmp_path / "a.csv", 99, dims=514))[0], x)
    assert about_slide(tmp_path / "a.csv", dims=512).dims == 512
    with pytest.raises(ValueError, match="features must be 384 numbers per patch, got 514; another encoder"):
        read_slide(tmp_path / "a.csv", dims=384)


def test_faults_of_a_csv(tmp_path):
    path, x = tmp_path / "a.csv", np.round(features(5, 12), 4)
    write_csv(path, x, tail="p.png")
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(",") - 20])
    with pytest.raises(
        ValueError, match=r"a.csv: patch 4 \(from 0\): must have 12 columns, found \d+; was the file cut off"
    ):
        read_slide(path)
    path.write_text(whole.replace(f"{x[2, 3]:.4f}", "oops"))
    with pytest.raises(ValueError, match=r"patch 2 \(from 0\): column 4 must be a number, found 'oops'"):
        list(chunks(path, 2))
    path.write_text(whole.replace(f"{x[3, 3]:.4f}", ""))  # pandas writes NaN so
    with pytest.raises(ValueError, match=r"patch 3 \(from 0\) holds NaN"):
        list(chunks(path, 2))
    path.write_text("9" * 200_000)
    with pytest.raises(ValueError, match=r"a.csv: is not a readable CSV \(field larger"):
        read_slide(path)
    path.write_text("p.png,0.1,0.2\n")
    with pytest.raises(ValueError, match=r"the features must be the first columns, found 'p.png'"):
        read_slide(path)


# What is wrong with slides --------------------------------------------------------------------------------------------------------------
def test_empty_slides(tmp_path):
    write_trident(tmp_path / "a.h5", np.zeros((0, 6), "f2"), np.zeros((0, 2)))
    with h5py.File(tmp_path / "b.h5", "w") as f:
        f["features"], f["coords"] = np.zeros(0, "f4"), np.zeros(0, "i8")
    torch.save(torch.zeros(0, 6), tmp_path / "c.pt")
    np.save(tmp_path / "d.npy", np.zeros((0, 6), "f4"))
    write_csv(tmp_path / "e.csv", np.zeros((0, 6)))
    (tmp_path / "f.csv").write_text("\n")  # of an empty DataFrame
    for name in ("a.h5", "b.h5", "c.pt", "d.npy", "e.csv", "f.csv"):
        slide = read_slide(tmp_path / name, dims=6)
        assert slide.features.shape == (0, 6), name
        assert list(chunks(tmp_path / name, dims=6)) == []
        assert about_slide(tmp_path / name).rows == 0
        assert about_slide(tmp_path / name).dims == (0 if name in ("b.h5", "f.csv") else 6)
    assert read_slide(tmp_path / "a.h5").coords.shape == (0, 2)
    assert read_slide(tmp_path / "b.h5").features.shape == (0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_nan_and_infinity(tmp_path, value, dtype, caplog):
    x, xy = features(dtype=dtype), grid(11)
    x[[5, 8], [2, 0]] = value
    write_trident(tmp_path / "a.h5", x, xy)
    for read in (read_slide, lambda p: list(chunks(p, 4))):
        with pytest.raises(
            ValueError, match=r"a.h5: patch 5 \(from 0\) holds NaN or infinity; `invoke slides pack --drop`"
        ):
            read(tmp_path / "a.h5")
    keep = np.delete(np.arange(11), [5, 8])
    slide = read_slide(tmp_path / "a.h5", drop=True)
    np.testing.assert_array_equal(slide.features, x[keep])
    np.testing.assert_array_equal(slide.coords, xy[keep])
    assert "a.h5: 2 of 11 patches hold NaN or infinity and are left out" in caplog.text
    assert [len(p[0]) for p in chunks(tmp_path / "a.h5", 4, drop=True)] == [4, 3, 2]
    assert slides.count_bad(tmp_path / "a.h5") == (2, 5)
    late = np.zeros((5000, 2), dtype)
    late[[4500, 4900]] = value
    np.save(tmp_path / "b.npy", late)
    assert slides.count_bad(tmp_path / "b.npy") == (2, 4500)
    np.save(tmp_path / "b.npy", x[[5, 8]])
    assert read_slide(tmp_path / "b.npy", drop=True).features.shape == (0, 6)


def test_a_number_beyond_float32_is_infinite(tmp_path):
    x = features().astype("f8")
    x[4, 1] = 1e300
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(ValueError, match="patch 4 "):
        read_slide(tmp_path / "a.npy")


def test_other_widths_and_shapes(tmp_path):
    write_clam(tmp_path / "a.h5", features(3, 512), grid(3))
    assert read_slide(tmp_path / "a.h5", dims=512).features.shape == (3, 512)
    with pytest.raises(
        ValueError,
        match=r"a.h5: features must be 1024 numbers per patch, got 512; .* trained on \[x, x\], write",
    ):
        read_slide(tmp_path / "a.h5", dims=1024)
    with pytest.raises(ValueError, match="must be 768 numbers per patch, got 512; another encoder"):
        list(chunks(tmp_path / "a.h5", dims=768))
    for array, what in (
        (np.zeros(768, "f4"), "holds one vector of 768 numbers, the embedding of a whole slide"),
        (np.zeros((2, 3, 4), "f4"), r"features must be \[n, d\], or \[1, n, d\], got \[2, 3, 4\]"),
        (np.float32(3), r"got \[\]"),
        (np.zeros((2, 3), "i8"), "features must be floating point numbers, got int64"),
    ):
        with h5py.File(tmp_path / "b.h5", "w") as f:
            f["features"] = array
        np.save(tmp_path / "b.npy", array)
        torch.save(torch.as_tensor(array), tmp_path / "b.pt")
        for name in ("b.h5", "b.npy", "b.pt"):
            with pytest.raises(ValueError, match=f"{name}: .*{what}"):
                about_slide(tmp_path / name)
    with h5py.File(tmp_path / "b.h5", "w") as f:
        f["features"], f["coords"] = features(3), grid(4)
    with pytest.raises(ValueError, match=r"coords must be \[3, 2\], x and y of each patch, got \[4, 2\]"):
        read_slide(tmp_path / "b.h5")
    with pytest.raises(ValueError, match="size must be at least 1 patch, got 0"):
        chunks(tmp_path / "a.h5", 0)


def test_files_that_are_none(tmp_path):
    def says(name, data, what):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: .*{what}"):
            read_slide(tmp_path / name)

    with pytest.raises(ValueError, match="no such file"):
        read_slide(tmp_path / "none.h5")
    with pytest.raises(ValueError, match="must be a file of patch features, found a folder"):
        read_slide(tmp_path)
    says("a.h5", b"", "is empty; patch features are HDF5")
    says("a.csv", b"", "is empty")
    says("a.pt", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer")
    says("b.csv", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer")
    says("c.pt", b"<html>", "starts with b'<html>'")
    write_clam(tmp_path / "h.h5", features(900), grid(900))
    says("d.h5", (tmp_path / "h.h5").read_bytes()[:9000], "cannot be read, or is broken")
    torch.save(torch.zeros(900, 6), tmp_path / "h.pt")
    says("d.pt", (tmp_path / "h.pt").read_bytes()[:9000], "is not a whole file of torch.save")
    np.save(tmp_path / "h.npy", features(900))
    says("d.npy", (tmp_path / "h.npy").read_bytes()[:9000], "is not a whole .npy file")
    np.savez(tmp_path / "h.npz", features=features())
    says("e.npz", (tmp_path / "h.npz").read_bytes(), "starts with")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt")
    says("f.pt", (tmp_path / "w.pt").read_bytes(), "must hold an array called features or .* found 'weight'")
    torch.save([torch.zeros(2)], tmp_path / "w.pt")
    says("g.pt", (tmp_path / "w.pt").read_bytes(), "must hold a tensor, or a dict with one, got list")
    x = features()  # the first bytes, not the suffix, say what a file is
    np.save(tmp_path / "h.npy", x)
    (tmp_path / "n.pt").write_bytes((tmp_path / "h.npy").read_bytes())
    same(tmp_path / "n.pt", x)


def test_room_that_was_never_written_is_no_patch_of_zeros(tmp_path):
    write_clam(tmp_path / "a.h5", features(70), grid(70))
    with h5py.File(tmp_path / "a.h5", "r+") as f:
        f["features"].resize(170, 0)  # then the next batch is written
        f["coords"].resize(170, 0)
    with pytest.raises(
        ValueError, match=r"a.h5: 'features' has room for 6 chunks and holds 3; was its writer killed\?"
    ):
        read_slide(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "w") as f:  # compressed files hold less, and are whole
        f.create_dataset("features", data=np.zeros((70, 6), "f4"), compression="gzip")
    same(tmp_path / "a.h5", np.zeros((70, 6), "f4"))


def test_features_of_other_files_are_never_read(tmp_path):
    """External storage, links and virtual datasets would make any file's bytes features."""
    (tmp_path / "secret").write_bytes(bytes(range(96)))
    write_clam(tmp_path / "other.h5", features(4), grid(4))

    def says(what, make):
        with h5py.File(tmp_path / "a.h5", "w") as f:
            make(f)
        for read in (about_slide, read_slide):
            with pytest.raises(
                ValueError, match=rf"a.h5: 'features' must be stored in this file, found {what}"
            ):
                read(tmp_path / "a.h5")

    says(
        "a dataset whose numbers",
        lambda f: f.create_dataset("features", (4, 6), "f4", external=[(str(tmp_path / "secret"), 0, 96)]),
    )
    says(
        "a link",
        lambda f: f.__setitem__("features", h5py.ExternalLink(str(tmp_path / "other.h5"), "features")),
    )
    says("a link", lambda f: f.__setitem__("features", h5py.SoftLink("/x")))
    layout = h5py.VirtualLayout((4, 6), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "features", (4, 6))
    says("a dataset whose numbers", lambda f: f.create_virtual_dataset("features", layout))
    with h5py.File(tmp_path / "a.h5", "w") as f:  # the same for coordinates
        f["features"] = features(4)
        f["coords"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "coords")
    with pytest.raises(ValueError, match=r"a.h5: 'coords' must be stored in this file"):
        read_slide(tmp_path / "a.h5")


def test_unfinished_compressed_features_are_no_zeros(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        held = f.create_dataset("features", (500, 6), "f4", chunks=(100, 6), compression="gzip")
        held[:400] = features(400)
    with pytest.raises(
        ValueError, match=r"a.h5: 'features' has room for 5 chunks and holds 4; was its writer killed\?"
    ):
        about_slide(tmp_path / "a.h5")


@pytest.mark.parametrize("size", [3, 5, 100])
def test_zeros_behind_the_patches_are_said_once(tmp_path, caplog, size):
    """Rows of a chunk that was begun and not filled, or padding: nothing else tells them from patches."""
    x = features(12)
    x[7:] = 0
    x[2] = 0
    np.save(tmp_path / "a.npy", x)
    for _ in range(2):
        list(chunks(tmp_path / "a.npy", size))
    said = "a.npy: the last 5 of 12 patches are all zeros and are taken as they are; were they padded, or was the writer killed?"
    assert caplog.text.count(said) == 1
    caplog.clear()
    np.save(tmp_path / "b.npy", x[:7])
    np.save(tmp_path / "c.npy", x * 0)
    list(chunks(tmp_path / "b.npy", size))
    list(chunks(tmp_path / "c.npy", size))
    assert not caplog.text


def test_sizes_are_checked_before_anything_is_allocated(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:  # few bytes that unpack to 96 MB
        f.create_dataset(
            "features", data=np.zeros((15625, 1536), "f4"), chunks=(15625, 1536), compression="gzip"
        )
    torch.save(torch.zeros(1, 1536).expand(10**9, 1536), tmp_path / "a.pt")
    assert (tmp_path / "a.h5").stat().st_size < 200_000
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    torch.save({"features": torch.zeros(10**9, 1536, device="meta")}, tmp_path / "m.pt")
    torch.save(torch.zeros(400, 600), tmp_path / "z.pt")
    with (
        zipfile.ZipFile(tmp_path / "z.pt") as whole,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    for name, what in (
        ("a.h5", r"'features' would unpack \d+ bytes to 96000000"),
        (
            "a.pt",
            r"features must be \[1000000000, 1536\] numbers of their own, the file holds 6144 bytes; .*contiguous",
        ),
        ("m.pt", r"features must be \[1000000000, 1536\] numbers of their own, the file holds 0 bytes"),
        (
            "packed.pt",
            r"must be uncompressed, as torch.save writes it; \d+ members are compressed and unpack to 9\d{5} bytes",
        ),
    ):
        for read in (about_slide, read_slide):
            with pytest.raises(ValueError, match=f"{name}: {what}"):
                read(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["h5", "npy", "pt", "old.pt", "csv"])
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    """Cut off or with wrong bytes: never another error than one that names the file."""
    path, gen = tmp_path / f"a.{kind}", np.random.default_rng(0)
    if kind == "h5":
        write_trident(path, features(70), grid(70))
    elif kind == "npy":
        np.save(path, features(70))
    elif kind == "csv":
        write_csv(path, features(70), tail="p.png")
    else:
        torch.save(
            {"features": torch.from_numpy(features(70))}, path, _use_new_zipfile_serialization=kind == "pt"
        )
    whole, refused = path.read_bytes(), 0
    for i in range(100):
        data = bytearray(whole[: gen.integers(len(whole))] if i % 2 else whole)
        for at in gen.integers(0, max(1, min(len(data), 400 if i % 4 else 10**9)), 6 * (len(data) > 0)):
            data[at] = gen.integers(256)
        path.write_bytes(data)
        try:
            read_slide(path)
        except ValueError as e:
            assert path.name in str(e)  # noqa: PT017
            refused += 1
    assert refused > 30


# Features -------------------------------------------------------------------------------------------------------------------------------
def test_patch_size_from_coordinates():
    xy = grid(40, 512, 7)[np.random.default_rng(0).permutation(40)[:30]]
    assert slides.patch_size_of(xy) == 512
    two = np.concatenate(
        [grid(30, 256, 6), grid(30, 256, 6) + np.array([3000, 7])]
    )  # two pieces of tissue, each with its own grid
    assert slides.patch_size_of(two) == 256
    assert slides.patch_size_of(np.array([[0, 0], [512, 512], [1024, 1536]])) == 512
    row = np.array([[512 * i, 0] for i in (*range(0, 40, 2), *range(1, 40, 2))])
    assert slides.patch_size_of(row) == slides.patch_size_of(row[:, ::-1]) == 512
    assert slides.patch_size_of(xy[:1]) is None
    assert slides.patch_size_of(xy[:0]) is None


def test_sampled():
    for n, most in ((30000, 10240), (10240, 10240), (7, 3), (5, 1)):
        np.testing.assert_array_equal(slides.sample_rows(n, most), np.linspace(0, n - 1, most, dtype=int))
    np.testing.assert_array_equal(slides.sample_rows(7, 9), range(7))
    assert len(slides.sample_rows(0, 4)) == 0
    with pytest.raises(ValueError, match="at least 1 of 0 or more patches, got most=0, n=3"):
        slides.sample_rows(3, 0)


# Real files -----------------------------------------------------------------------------------------------------------------------------
def test_real_files(shared_data, caplog):
    folder = shared_data / "pathology" / "gigapath"
    slide = read_slide(folder / "prov_normal_000_1_trident_style.h5", dims=1536)
    assert slide.features.shape == (196, 1536)
    assert slide.patch_size == 16
    assert "taken as 16 level-0 pixels" in caplog.text
    tokens = read_slide(
        folder / "prov_normal_000_1.npy"
    ).features  # [1, 197, 1536]: the class token and 196 patches
    assert tokens.shape == (197, 1536)
    np.testing.assert_array_equal(tokens[1:], slide.features)
    np.testing.assert_array_equal(
        np.concatenate([c[0] for c in chunks(folder / "prov_normal_000_1.npy", 50)]), tokens
    )
    with pytest.raises(ValueError, match="one vector of 1536 numbers, the embedding of a whole slide"):
        read_slide(folder / "prov_normal_000_1.pt")


def test_what_is_no_file_is_told_from_what_is_not_there(tmp_path):
    (tmp_path / "folder.h5").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")
    for name, what in {
        "folder.h5": "found a folder",
        "pipe.h5": "found a pipe",
        "nothing.h5": "no such file",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*{what}"):
            read_slide(tmp_path / name)
