"""Animations: their pictures grow to the whole paths."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from fastrms import plots
from fastrms.plots import figures


def frames(data):
    with Image.open(io.BytesIO(data)) as image:
        found = []
        for k in range(image.n_frames):
            image.seek(k)
            found.append((image.info["duration"], np.asarray(image.convert("RGB")).astype(int)))
        return found, image.info.get("loop")


@pytest.mark.parametrize("panels", [["path"], ["surface", "rates"]], ids=",".join)
def test_animation_grows_to_the_whole_paths(panels):
    file, done = io.BytesIO(), []
    plots.animate("bowl", file, panels=panels, steps=7, on_picture=lambda *counts: done.append(counts))
    found, loop = frames(file.getvalue())
    assert loop == 0
    assert [duration for duration, _ in found] == [80] * 7 + [1500]
    assert done == [(k, 8) for k in range(1, 9)]
    figure, _ = plots.overview("bowl", panels=panels, steps=7)
    figure.set_dpi(80)
    figure.canvas.draw()
    whole = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    assert {picture.shape for _, picture in found} == {whole.shape}
    # Below the title, which has the step too, and but for what 256 colours cannot show.
    differences = [np.abs(picture - whole)[40:].max(axis=2) > 60 for _, picture in found]
    counts = [int(each.sum()) for each in differences]
    assert counts[-1] < 20
    assert counts[0] > counts[3] > counts[-1] + 50
    assert (found[-1][1][-1, -1] > 250).all()  # paper stays white


def test_an_animation_goes_where_its_path_led_when_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def leaves(x, y):
        os.chdir(tmp_path / "elsewhere")
        return x * x + y * y

    plots.animate(leaves, "path.gif", panels=["values"], start=(1.0, 1.0), region=((-2, 2), (-2, 2)), steps=1)
    assert (tmp_path / "path.gif").exists()


@pytest.mark.parametrize("steps", [0, 1, 7, 50, 51, 300, 1000, 100_000])
def test_pictures_are_close_together_at_first(steps):
    shown = figures._shown_steps(steps)
    assert (shown[0], shown[-1]) == (0, steps)
    assert len(shown) <= 51
    gaps = np.diff(shown)
    if steps <= 50:
        assert (gaps == 1).all()
    else:
        assert gaps[0] <= max(1, 0.1 * steps / 50)  # of even gaps, each is a fiftieth
        assert gaps[-1] > 1.9 * steps / 50
    if steps == 300:
        assert shown[:5] == [0, 1, 2, 3, 4]


def test_animation_of_many_steps_has_few_pictures():
    file = io.BytesIO()
    plots.animate("bowl", file, panels=["values"], steps=2000, settings=[{}])
    assert len(frames(file.getvalue())[0]) <= 51
