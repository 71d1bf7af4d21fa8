"""Figures of an ablation: which are drawn for which sweep, against what, and that nothing in them overlaps."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from diffpolicy.ablation_axes import changes_calls, curve_axes, guided_axes, problem_letters, varying_axes
from diffpolicy.ablation_cells import AblationResult, CellResult
from diffpolicy.ablation_plots import curves, differences, draw_figures, forest, heat_map, trade_off
from diffpolicy.ablation_table import summarise


def sweep(
    axes: dict[str, list],
    nfe=lambda values: 10,
    *,
    problems=lambda values: (),
    starts=20,
    oracle=None,
    seeds=2,
    guidance=lambda values: {},
    diversity=lambda values: None,
):
    """Every combination of the axes, with random successes."""
    rng = np.random.default_rng(0)
    cells = []
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        successes = rng.random((seeds, starts)) < 0.6
        cells.append(
            CellResult(
                label=", ".join(f"{name} {value}" for name, value in values.items()),
                axes=values,
                train_seeds=range(seeds),
                env_seeds=range(starts),
                scores=np.where(successes, 1.0, 0.4),
                successes=successes,
                nfe=nfe(values),
                call_ms=1.0,
                labels=problems(values),
                oracle=oracle and oracle(values),
                guidance=guidance(values),
                diversity=diversity(values),
            )
        )
    return AblationResult(name="sweep", question="?", cells=cells)


def drawn(figure):
    """The figure, laid out, and the renderer that measures its texts in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def overlapping(boxes) -> list:
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


LONG = sweep(
    {
        "schedule": ["cosine", "linear", "sigmoid", "laplace", "linear with betas rescaled to zero terminal signal"],
        "sampler": ["ddim", "multistep"],
        "steps": [4, 10, 50],
    },
    nfe=lambda values: values["steps"],
    problems=lambda values: ("terminal signal 60 %",) if values["schedule"] == "linear" else (),
    oracle=lambda values: {"energy_distance": 0.2 / values["steps"], "energy_floor": 0.0035},
)
CALLS = {"4": 4, "heun of 4": 8, "16": 16}


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (sweep({"schedule": ["cosine"]}), ["cells"]),
        (sweep({"schedule": ["cosine", "linear"]}), ["cells", "differences"]),
        (sweep({"a": ["x", "y"], "b": [True, False]}), ["cells", "heat_map", "differences"]),
        (sweep({"steps": [4, 8]}, nfe=lambda v: v["steps"]), ["cells", "curves", "differences"]),
        (sweep({"lr": [1e-4, 1e-3], "ema": [0.9, 0.99]}), ["cells", "curves", "curves_2", "heat_map", "differences"]),
        (LONG, ["cells", "curves", "differences"]),
    ],
    ids=["one cell", "words", "words and truth values", "steps", "two numbers", "three axes"],
)
def test_sweep_gets_the_figures_that_fit_it_as_png_and_pdf(result, names, tmp_path):
    files = draw_figures(result, summarise(result), tmp_path)
    assert [file.stem for file, caption in files if caption] == names
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"{n}.{end}" for n in names for end in ("pdf", "png")
    )


def guided(weights: dict, *, goals=("centre", "corner"), unknown=()) -> AblationResult:
    """A sweep over labels of weights; the larger the weight, the less diverse."""
    rng = np.random.default_rng(1)
    return sweep(
        {"goal": list(goals), "how": list(weights)},
        guidance=lambda v: {"task": weights[v["how"]], "goal": 1.0},
        diversity=lambda v: None if v["how"] in unknown else (3 - weights[v["how"]]) * rng.uniform(0.1, 0.2, (2, 12)),
    )


WEIGHTS = {"strong": 2.0, "as trained": 1.0, "unheard": 0.0}


def test_guidance_is_drawn_as_success_against_diversity_in_the_order_of_its_weights():
    """Also where the weights hide in labelled settings."""
    result = guided(WEIGHTS)
    assert guided_axes(result) == ["how"]
    summaries = summarise(result)
    success, score = trade_off(result, summaries, "how").axes
    by_label = {line.get_label(): line for line in success.get_lines()}
    assert list(by_label) == ["centre", "corner"]
    ordered = [s for s in reversed(summaries) if s.cell.axes["goal"] == "corner"]
    assert by_label["corner"].get_xdata() == pytest.approx([s.diversity for s in ordered])
    assert by_label["corner"].get_ydata() == pytest.approx([100 * s.success for s in ordered])
    assert [text.get_text() for text in success.texts] == ["0", "1", "2"] * 2
    ends = np.sort([path.vertices[:, 0] for path in success.collections[-1].get_paths()], axis=0)
    assert ends == pytest.approx(np.sort([s.diversity_interval for s in ordered], axis=0))
    assert score.get_lines()[0].get_xdata() == pytest.approx(success.get_lines()[0].get_xdata())


def test_figure_of_diversity_has_a_caption_and_says_what_it_lacks(tmp_path):
    result = guided(WEIGHTS, unknown=["strong"])
    files = draw_figures(result, summarise(result), tmp_path)
    assert [file.stem for file, _ in files] == ["cells", "diversity", "heat_map", "differences"]
    assert (tmp_path / "diversity.png").exists() and (tmp_path / "diversity.pdf").exists()
    caption = files[1][1]
    assert "One point per weight of guidance (task)" in caption and "2 settings are missing" in caption
    assert len(trade_off(result, summarise(result), "how").axes[0].texts) == 4


def test_no_figure_of_diversity_where_no_weight_varies_or_nothing_is_known():
    assert guided_axes(guided({"euler": 2.0, "heun": 2.0})) == []
    assert guided_axes(guided(WEIGHTS, unknown=["strong", "unheard"])) == []
    assert guided_axes(sweep({"steps": [2, 4]}, diversity=lambda v: np.ones((2, 5)))) == []


def test_steps_are_drawn_against_network_calls_and_not_against_steps():
    result = sweep(
        {"sampler": ["ddim", "heun"], "steps": [4, 8]}, nfe=lambda v: v["steps"] * (1 + (v["sampler"] == "heun"))
    )
    assert changes_calls(result, "steps") and curve_axes(result) == ["steps"]
    panel = curves(result, summarise(result), "steps").axes[0]
    assert panel.get_xlabel() == "network calls per chunk (NFE)"
    ends = {line.get_label(): line.get_xdata() for line in panel.get_lines()}
    assert ends["heun"] == pytest.approx([8, 16], rel=0.05) and ends["ddim"] == pytest.approx([4, 8], rel=0.05)


def test_number_that_changes_no_calls_is_drawn_against_itself():
    result = sweep({"lr": [0.001, 0.0001], "net": ["unet", "mlp"]})
    panel = curves(result, summarise(result), "lr").axes[0]
    assert panel.get_xlabel() == "lr" and len(panel.get_lines()) == 2
    assert all(np.diff(line.get_xdata()) > 0 for line in panel.get_lines())


def test_named_settings_that_differ_in_calls_make_a_curve():
    result = sweep({"schedule": ["cosine", "linear"], "steps": list(CALLS)}, nfe=lambda v: CALLS[v["steps"]])
    assert curve_axes(result) == ["steps"] and varying_axes(result) == ["schedule", "steps"]


def test_values_of_curves_are_the_cells_own():
    result = sweep({"steps": [2, 4, 8]}, nfe=lambda v: v["steps"])
    (line,) = curves(result, summarise(result), "steps").axes[0].get_lines()
    assert line.get_ydata() == pytest.approx([100 * cell.successes.mean() for cell in result.cells])


def test_oracle_has_its_own_panel_with_its_floor_only_where_it_was_asked():
    graded = curves(LONG, summarise(LONG), "steps")
    assert [panel.get_title() for panel in graded.axes][2] == "sampler alone: energy distance"
    assert any("floor" in text.get_text() for text in graded.axes[2].texts)
    plain = sweep({"steps": [2, 4]}, nfe=lambda v: v["steps"])
    assert len(curves(plain, summarise(plain), "steps").axes) == 2


@pytest.mark.parametrize("draw", [forest, differences])
def test_labels_of_thirty_cells_do_not_overlap_or_leave_the_page(draw):
    figure = draw(LONG, summarise(LONG))
    renderer = drawn(figure)
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    boxes += [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert len(LONG.cells) == 30 and len(boxes) >= 29
    assert overlapping(boxes) == []
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.x1 <= width + 1 and box.y0 >= 0 and box.y1 <= height for box in boxes)


def test_legend_notes_and_panels_of_thirty_cells_do_not_overlap():
    figure = curves(LONG, summarise(LONG), "steps")
    renderer = drawn(figure)
    notes = next(text for text in figure.texts if text.get_text().startswith("[a]"))
    boxes = [panel.get_tightbbox(renderer) for panel in figure.axes]
    boxes += [figure.legends[0].get_window_extent(renderer), notes.get_window_extent(renderer)]
    assert overlapping(boxes) == []
    assert boxes[-1].y0 >= 0


def test_lines_differ_in_more_than_colour():
    lines = curves(LONG, summarise(LONG), "steps").axes[0].get_lines()
    assert len(lines) == len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 10


def test_problem_of_a_setting_is_named_under_every_figure():
    two = sweep(
        {"schedule": ["cosine", "linear"], "steps": [4, 8]},
        problems=lambda v: ("no end",) * (v["schedule"] == "linear"),
    )
    summaries = summarise(two)
    for figure in (
        forest(two, summaries),
        curves(two, summaries, "steps"),
        heat_map(two, summaries),
        differences(two, summaries),
    ):
        assert "[a] no end" in [text.get_text() for text in figure.texts]
    assert [label.get_text().endswith("[a]") for label in forest(two, summaries).axes[0].get_yticklabels()] == [
        0,
        0,
        1,
        1,
    ]


def test_problems_have_letters_of_their_own():
    letters = problem_letters(sweep({"x": list(range(30))}, problems=lambda v: (f"problem {v['x']}",)).cells)
    assert len(set(letters.values())) == 30 and letters["problem 0"] == "a" and letters["problem 26"] == "aa"


def test_heat_map_writes_each_rate_and_hatches_what_is_missing():
    full = sweep({"schedule": ["cosine", "linear"], "net": ["unet", "mlp", "dit"]})
    result = AblationResult(name="x", question="?", cells=full.cells[:-1])
    panel = heat_map(result, summarise(result)).axes[0]
    rates = [float(text.get_text().split("\n")[0]) for text in panel.texts]
    assert rates == pytest.approx([100 * cell.successes.mean() for cell in result.cells], abs=0.051)
    assert [patch.get_hatch() for patch in panel.patches] == ["////"]


def test_truth_value_and_number_one_are_two_values_of_an_axis():
    result = sweep({"ema": [True, 1, None], "net": ["unet", "mlp"]})
    panel = heat_map(result, summarise(result)).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["True", "1", "None"]


def test_filled_mark_means_supported():
    base, gained = np.arange(60) < 20, np.arange(60) < 55

    def cell(name, successes):  # fmt: skip
        return CellResult(label=name, axes={"s": name}, train_seeds=[0], env_seeds=range(60), scores=successes[None] * 1.0,
                          successes=successes[None], nfe=1, call_ms=1.0)  # fmt: skip

    cells = [cell("base", base), cell("good", gained), cell("same", np.roll(base, 1))]
    result = AblationResult(name="x", question="?", cells=cells)
    marks = [line for line in differences(result, summarise(result)).axes[0].get_lines() if line.get_marker() in "^vo"]
    assert [(line.get_marker(), line.get_markerfacecolor() == "white") for line in marks] == [("^", False), ("o", True)]
