"""Folders of images: the network sees what a viewer shows, or one sentence says why not."""

import io
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import edm_teacher as edm
from tools import data, metrics

RED, WHITE = (200, 30, 30), (255, 255, 255)


def file(mode="RGB", colour=RED, form="PNG", turn=1, **how) -> bytes:
    """8 x 8 pixels of one colour, the right half white; EXIF tag 0x0112 tells to turn them."""
    out, image = io.BytesIO(), Image.new(mode, (8, 8), colour)
    image.paste("white" if mode == "RGB" else colour, (4, 0, 8, 8))
    image.getexif()[0x0112] = turn
    image.save(out, form, exif=image.getexif(), **how)
    return out.getvalue()


def numbers(value, kind="uint16", form="TIFF") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, kind)).save(out, form)
    return out.getvalue()


TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("workflow", "{}" * 1_500_000, zip=True)
GOOD, HUGE = file(), b"IHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0"  # 65536 x 65536
BODY = GOOD.index(b"IDAT")


@pytest.mark.parametrize(
    ("name", "content", "seen"),
    [
        ("rgb.png", GOOD, RED),
        ("turned.png", file(turn=3), WHITE),
        ("text.png", file(pnginfo=TEXT), RED),
        ("palette.gif", file("P", 0, "GIF"), (0, 0, 0)),
        ("clear.png", file("RGBA", (*RED, 0)), WHITE),
        ("half.png", file("RGBA", (*RED, 127)), (228, 143, 143)),
        ("grey.png", file("LA", (30, 0)), WHITE),
        ("key.png", file("P", 0, transparency=0), WHITE),
        ("colour.png", file(transparency=RED), WHITE),
        ("16.png", numbers(100 * 257 + 100, form="PNG"), (100, 100, 100)),
        ("16.tif", numbers(65535), WHITE),
        ("big-endian.tif", numbers(257, ">u2"), (1, 1, 1)),
        ("16.pgm", numbers(100 * 257, form="PPM"), (100, 100, 100)),
        ("int.tif", numbers(7, "int32"), "mode I has no known range: save it with 8 or 16 bits"),
        ("float.tif", numbers(0.5, "float32"), "mode F has no known range"),
        ("empty.png", b"", "cannot identify"),
        ("html.png", b"<html>404</html>", "cannot identify"),
        ("truncated.png", GOOD[: BODY + 9], "truncated"),
        ("length.png", GOOD[: BODY - 4] + b"\0\0\0\5" + GOOD[BODY:], "broken PNG file"),
        ("crc.png", GOOD[:29] + b"????" + GOOD[33:], "cannot identify"),
        ("data.png", GOOD[: BODY + 8] + b"????" + GOOD[BODY + 12 :], "broken data"),
        ("bomb.png", GOOD[:12] + HUGE + zlib.crc32(HUGE).to_bytes(4, "big") + GOOD[33:], "bomb"),
    ],
)
def test_pictures_are_read_as_they_are_shown_or_refused_by_name(name, content, seen, tmp_path):
    """Transparent parts are white, 16 bits are divided by 257, the camera's turn is undone."""
    (tmp_path / name).write_bytes(content)
    if isinstance(seen, tuple):
        assert data.open_image(tmp_path / name).getpixel((0, 4)) == pytest.approx(seen, abs=1)
    else:
        with pytest.raises(edm.UserError, match=f"{name} cannot be read as a picture .*{seen}"):
            data.open_image(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (".git/a.png 10/a.png 2/frame10.PNG 2/frame2.jpg 2/in/x.png 0/._a.png 0/a.gif 0/.DS 0/a.txt"
         " __MACOSX/a.png top.png", "label 0 is 0, 1 is 2, 2 is 10\n.*: 6 files skipped"),
        ("train/a.png cat/a.png", "label 0 is cat, 1 is train"),
        ("", "no sub-folder of images for each class"),
        ("a.png b.png", "no sub-folder of images for each class"),
        ("cat/a.png dog/a.txt", "no image in the class folder dog"),
        ("train/cat/a.png Test/cat/a.png", "expected class folders; is it --data .*Test"),
        ("train/cat/a.png README.md", "expected class folders; is it --data .*train"),
    ],
)  # fmt: skip
def test_nothing_of_a_folder_is_lost_in_silence(files, said, tmp_path, capsys):
    """Labels are the class folders in natural order. What is skipped is counted, or refused."""
    for name in files.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if "label" not in said:
        with pytest.raises(edm.UserError, match=said):
            data.class_folders(tmp_path)
    else:
        images = list(data.class_folders(tmp_path).values())[1]
        wanted = ["frame2.jpg", "frame10.PNG", "x.png"] if "2/" in files else ["a.png"]
        assert [image.name for image in images] == wanted
        assert re.search(said, capsys.readouterr().out)


def test_two_hundred_images_train_without_metrics(tmp_path, monkeypatch, capsys):
    """Every 10th image of a class is for testing. 20 are too few for metrics: said, not an error.
    A folder in the working directory does not hide the data set of its name."""
    monkeypatch.chdir(tmp_path)
    for name in ("synthetic", "few/a", "few/b"):
        (tmp_path / name).mkdir(parents=True)
    assert len(data.load_data("synthetic")[0]) == 2048
    with pytest.raises(edm.UserError, match="not mnist, cifar10, synthetic or a folder"):
        data.load_data("synthetik")
    for i in range(200):
        Image.new("L", (8, 8), i).save(f"few/{'ab'[i >= 195]}/{i}.png")
    assert data.load_data("few", resolution=8)[1].bincount().tolist() == [176, 5]
    test, _ = data.load_data("few", train=False, resolution=8)
    assert test[:, 0, 0, 0].tolist() == list(range(9, 195, 10))
    small = {"resolution": 8, "steps": 1, "batch": 4, "model_channels": 8}
    cfg = edm.Config(data="few", **small, device="cpu", out=str(tmp_path / "run"))
    assert edm.main(cfg)["metrics"] == {}
    assert "fewer than 50 test images: there are no metrics" in capsys.readouterr().out
    with pytest.raises(edm.UserError, match="is --data right"):  # known before training
        metrics.get_metric(cfg, tmp_path / "run", edm.Denoiser(torch.nn.Identity(), (3, 8, 8), 3))
