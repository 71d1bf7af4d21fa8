"""Figures: their size, and that what they claim to show is where they show it."""

import imageio.v3 as iio
import numpy as np
import pytest

from diffpolicy.plots import (
    DARKEST,
    FAN_COLOURS,
    GREEN,
    RED,
    WORD_COLOUR,
    attention_overlay,
    chunk_fan,
    chunk_fans,
    contact_sheet,
    score_against,
    side_by_side,
    weighted_words,
    write_film,
    write_png,
)


def flat(colour: tuple[int, int, int], size: int = 20) -> np.ndarray:
    return np.full((size, size, 3), colour, np.uint8)


def test_contact_sheet_frames_success_green_and_failure_red():
    sheet = contact_sheet([flat((0, 0, 255)), flat((255, 255, 0))], ["1", "2"], [True, False], tile=40, columns=8)
    assert sheet.shape == (40 + 8 + 16, 2 * (40 + 8), 3) and sheet.dtype == np.uint8
    assert tuple(sheet[20, 2]) == GREEN and tuple(sheet[20, 48 + 2]) == RED
    assert tuple(sheet[24, 24]) == (0, 0, 255) and tuple(sheet[24, 48 + 24]) == (255, 255, 0)


def test_contact_sheet_fills_rows_from_the_left():
    sheet = contact_sheet([flat((i, i, i)) for i in (10, 20, 30)], ["a", "b", "c"], [True] * 3, tile=16, columns=2)
    height, width = 16 + 8 + 16, 16 + 8
    assert sheet.shape == (2 * height, 2 * width, 3)
    assert [sheet[y + 12, x + 12, 0] for y, x in ((0, 0), (0, width), (height, 0))] == [10, 20, 30]
    assert (sheet[height:, width:] == 255).all()


def test_contact_sheet_writes_its_captions():
    empty, written = (contact_sheet([flat((0, 0, 0))], [text], [True], tile=40) for text in ("", "100000  0.97"))
    assert (empty[-15:] != written[-15:]).any() and (empty[:-16] == written[:-16]).all()


def test_contact_sheet_with_a_label_missing_is_refused():
    with pytest.raises(ValueError):
        contact_sheet([flat((0, 0, 0))] * 2, ["1"], [True, False])


def test_chunk_fan_draws_along_the_chunk_and_nowhere_else():
    chunk = np.stack([np.linspace(10, 50, 8), np.full(8, 30.0)], axis=-1)  # left to right in row 30
    picture = flat((255, 255, 255), size=60)
    drawn = chunk_fan(picture, chunk[None])
    assert drawn.shape == picture.shape
    changed = (drawn != 255).any(axis=-1)
    assert changed[30, 12:48].all() and not changed[:25].any() and not changed[36:].any()
    first, last = drawn[30, 12].astype(int), drawn[30, 46].astype(int)
    assert first[2] > first[1] and last[1] > last[2]  # from violet to yellow-green
    larger = (chunk_fan(picture, chunk[None], scale=2) != 255).any(axis=-1)
    assert larger.shape == (120, 120) and larger[60, 24:96].all() and not larger[:50].any()


def test_chunk_fan_shows_both_modes():
    up, down = (np.stack([np.linspace(10, 50, 8), 30 + sign * np.linspace(0, 20, 8)], axis=-1) for sign in (-1, 1))
    changed = (chunk_fan(flat((255, 255, 255), size=60), np.stack([up, down])) != 255).any(axis=-1)
    assert changed[10, 45:55].any() and changed[50, 45:55].any() and not changed[30, 40:].any()


def test_chunk_fans_give_each_heading_its_colour_and_a_line_of_text():
    right = np.stack([np.linspace(10, 50, 8), np.full(8, 10.0)], axis=-1)
    down = np.stack([np.full(8, 10.0), np.linspace(20, 50, 8)], axis=-1)
    drawn = chunk_fans(flat((255, 255, 255), size=60), {"right": right[None], "down": down[None]})
    assert drawn.shape == (60 + 2 * 20, 60, 3)
    for (y, x), colour in zip(((10, 30), (35, 10)), FAN_COLOURS, strict=False):
        assert np.abs(np.subtract(drawn[y, x], colour, dtype=int)).max() < 40  # smoothed
    assert (drawn[60:80] != 255).any() and (drawn[80:] != 255).any()


def test_more_fans_than_colours_are_refused():
    with pytest.raises(ValueError, match="fans must have 1 to 3 headings"):
        chunk_fans(flat((0, 0, 0)), {str(i): np.zeros((1, 2, 2)) for i in range(4)})


def test_attention_overlay_lights_the_heaviest_patch_and_darkens_the_rest():
    weights = np.array([[0.0, 0.2], [0.1, 0.0]])  # rows from the top, columns from the left
    lit = attention_overlay(flat((200, 100, 0)), weights)
    levels = [1.0, DARKEST + (1 - DARKEST) / 2, DARKEST]
    corners = (lit[0, 19], lit[19, 0], lit[0, 0])
    assert [tuple(corner) for corner in corners] == [(round(200 * k), round(100 * k), 0) for k in levels]


def test_attention_overlays_of_one_scale_can_be_compared():
    weights = np.full((2, 2), 0.1)
    alone, among = (attention_overlay(flat((200, 200, 200)), weights, largest=k) for k in (None, 0.2))
    assert (alone[0, 0, 0], among[0, 0, 0]) == (200, round(200 * (DARKEST + (1 - DARKEST) / 2)))


def test_attention_overlay_refuses_what_is_no_grid_of_weights():
    for weights in (np.full(4, 0.25), np.array([[0.5, -0.1]]), np.array([[np.nan, 0.1]])):
        with pytest.raises(ValueError, match=r"weights must be \(rows, columns\)"):
            attention_overlay(flat((0, 0, 0)), weights)


def test_weighted_words_colours_the_heaviest_word_of_all_sentences():
    picture = weighted_words([["push", "red"], ["push"]], [[0.0, 0.5], [0.25]])
    background = [tuple(picture[y, x]) for y, x in ((9, 9), (9, picture.shape[1] - 10), (53, 9))]
    halfway = tuple(round((255 + full) / 2) for full in WORD_COLOUR)
    assert background[:2] == [(255, 255, 255), WORD_COLOUR]
    assert np.abs(np.subtract(background[2], halfway)).max() <= 1


def test_weighted_words_need_a_weight_for_each_word():
    with pytest.raises(ValueError):
        weighted_words([["push", "red"]], [[1.0]])


def test_side_by_side_keeps_pictures_and_puts_white_between():
    row = side_by_side([flat((1, 1, 1)), flat((2, 2, 2)), flat((3, 3, 3))], gap=4)
    assert row.shape == (20, 3 * 20 + 2 * 4, 3)
    assert row[0, [0, 20, 24, 44, 48], 0].tolist() == [1, 255, 2, 255, 3]


def test_png_comes_back_equal(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    path = write_png(tmp_path / "new" / "a.png", picture)
    np.testing.assert_array_equal(iio.imread(path), picture)


@pytest.mark.parametrize("size", [64, 51])
def test_film_has_its_frames_in_order_and_its_rate(tmp_path, size):
    frames = [flat((level, level, level), size) for level in (20, 120, 220)]
    path = write_film(tmp_path / "new" / "a.mp4", frames, fps=10)
    back = iio.imread(path, plugin="FFMPEG")
    assert len(back) == 3
    assert [int(frame.mean()) for frame in back] == pytest.approx([20, 120, 220], abs=6)
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 10


def test_score_figure_is_written(tmp_path):
    series = {"ours": ([0.2, 0.9], [(0.1, 0.3), (0.85, 0.95)])}
    score_against(tmp_path / "a.png", [1000, 2000], series, xlabel="steps", ylabel="mean score")
    assert iio.imread(tmp_path / "a.png").shape[:2] == (480, 750)
