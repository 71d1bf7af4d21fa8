"""The report of an ablation: what it claims, what it must not claim, and files that others can read."""

import csv
import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffpolicy.ablation_cells import AblationResult, CellResult
from diffpolicy.ablation_report import conclusions, markdown_table, write_report
from diffpolicy.ablation_table import episode_rows, summarise, table_rows
from diffpolicy.metrics import clustered_bootstrap_interval, wilson_interval


def cell(label: str, successes, **changes) -> CellResult:
    """A cell whose score is 1 where it succeeded and .5 where not."""
    successes = np.atleast_2d(np.asarray(successes, bool))
    num_networks, num_starts = successes.shape
    values = {
        "label": label,
        "axes": {"process.schedule": label},
        "train_seeds": range(num_networks),
        "env_seeds": range(100_000, 100_000 + num_starts),
        "scores": np.where(successes, 1.0, 0.5),
        "successes": successes,
        "nfe": 10,
        "call_ms": 12.5,
    }
    return CellResult(**values | changes)


def solved(*numbers: int, starts: int = 100, rng: int = 0) -> np.ndarray:
    """(S, starts) bool, `numbers[s]` of them True, at places of their own for every network."""
    rng = np.random.default_rng(rng)
    return np.array([rng.permutation(starts) < number for number in numbers])


def ablation(*cells: CellResult, **changes) -> AblationResult:
    return AblationResult(**{"name": "noise", "question": "Which schedule?", "cells": cells} | changes)


def said(result: AblationResult) -> dict[str, list[str]]:
    return conclusions(result, summarise(result))


class Page(HTMLParser):
    """Reads a page: its text, the tags that are open, and everything that it would fetch."""

    void = ("meta", "img", "br", "link")

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.fetched, self.open, self.words = [], [], [], []
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page_of(result: AblationResult, folder) -> Page:
    page = Page(write_report(result, folder).read_text())
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert page.fetched and all(address.startswith("data:image/png;base64,") for address in page.fetched)
    return page


THREE = ablation(
    cell("cosine", solved(80, 82, 78)),
    cell("linear", solved(40, 45, 42, rng=1), labels=("terminal signal 60 %",)),
    cell("sigmoid", solved(79, 78, 82, rng=2)),
    described={"command": "diffpolicy ablate noise.yaml", "versions": {"torch": "2.9"}, "minutes": 12.34},
)


def test_large_difference_is_supported_and_a_small_one_is_said_to_need_more_episodes():
    words = said(THREE)
    assert len(words["Supported differences"]) == len(words["Not told apart"]) == 1
    assert words["Supported differences"][0].startswith('"linear" succeeds less often than "cosine": -37.7 points [')
    assert words["In short"] == [
        'Against "cosine", success: 1 worse, 1 not told apart; score: 1 worse, 1 not told apart; of 2 settings.'
    ]
    untold = words["Not told apart"][0]
    assert untold.startswith(
        'n = 300 paired episodes cannot tell "sigmoid" and "cosine" apart (difference -0.3 points, '
    )
    assert int(re.search(r"about ([\d,]+) would", untold)[1].replace(",", "")) > 10_000


def test_p_values_of_a_table_are_corrected_for_all_that_it_asks():
    """Success and score of every comparison are one family: Holm's first factor is twice the number of comparisons."""
    one = summarise(ablation(*THREE.cells[:2]))[1].comparison
    two = summarise(THREE)[1].comparison
    assert one.start_p == two.start_p and one.score_p == two.score_p
    assert one.holm_p == pytest.approx(2 * one.start_p) and two.holm_p == pytest.approx(4 * two.start_p)


def test_a_cell_may_be_compared_with_another_than_the_baseline():
    """Every sampler with DDIM at equal calls: the question of the sweep, not the distance to one cell."""
    names = {"ddim 4": 70, "unipc 4": 80, "ddim 10": 85, "unipc 10": 86}
    cells = [cell(name, solved(n, n + 1, n - 1, rng=n)) for name, n in names.items()]
    result = ablation(*cells, references={"unipc 4": "ddim 4", "unipc 10": "ddim 10"})
    by_label = {s.cell.label: s.comparison for s in summarise(result)}
    assert {label: c and c.reference for label, c in by_label.items()} == {
        "ddim 4": None, "unipc 4": "ddim 4", "ddim 10": "ddim 4", "unipc 10": "ddim 10",
    }  # fmt: skip
    assert by_label["unipc 10"].difference == pytest.approx(0.01)
    assert any('"unipc 10" and "ddim 10" apart' in sentence for sentence in said(result)["Not told apart"])
    assert said(result)["In short"][0].startswith("Against the setting named with each")
    with pytest.raises(ValueError, match="no cell is called 'ddim 5'"):
        ablation(*cells, references={"unipc 4": "ddim 5"})


def test_small_p_that_does_not_survive_correction_is_no_supported_difference():
    base = np.arange(100) < 60
    gained = np.arange(100) < 68  # eight discordant pairs, all one way: p = 2 / 2^8 = .0078
    others = [cell(f"other {i}", base) for i in range(9)]
    alone = ablation(cell("base", base), cell("gained", gained))
    among = ablation(cell("base", base), cell("gained", gained), *others)
    assert summarise(alone)[1].comparison.verdict == "better"
    assert summarise(among)[1].comparison.verdict == "not told apart"
    # eleven cells, ten comparisons, success and score: twenty questions
    assert re.search(
        r"The interval of this one comparison leaves out zero, but the corrected p is 0\.1[5-9]", str(said(among))
    )


def test_networks_that_scatter_are_told_from_networks_trained_anew():
    scattered = ablation(cell("base", solved(70, 71, 72, starts=300)), cell("lucky", solved(250, 60, 170, starts=300)))
    c = summarise(scattered)[1].comparison
    assert c.verdict == "better" and c.anew[0] < 0 < c.interval[0]
    assert "networks trained anew could turn it round" in str(said(scattered))
    steady = ablation(cell("base", solved(70, 71, 72, starts=300)), cell("good", solved(200, 201, 199, starts=300)))
    assert "holds for networks trained anew as well" in str(said(steady))


def test_one_training_seed_leaves_the_variation_between_runs_unknown(tmp_path):
    result = ablation(cell("a", solved(50)), cell("b", solved(90, rng=3)))
    assert "the variation between training runs is unknown" in page_of(result, tmp_path).text
    assert summarise(result)[1].comparison.anew is None
    assert "unknown" not in str(said(THREE))


def test_cells_with_other_start_states_are_never_called_paired():
    moved = cell("moved", solved(80), env_seeds=range(100))
    result = ablation(cell("base", solved(50)), moved)
    c = summarise(result)[1].comparison
    assert (c.verdict, c.paired, c.mcnemar_p, c.holm_p) == ("not paired", False, None, None)
    assert c.interval[0] < 0.3 < c.interval[1]
    assert "no pairing is claimed" in str(said(result)) and "paired episodes" not in str(said(result))


def test_start_states_in_another_order_are_matched_by_their_seed():
    base = solved(60)
    order = np.random.default_rng(5).permutation(100)
    shuffled = cell("same", base[:, order], env_seeds=(100_000 + order).tolist())
    c = summarise(ablation(cell("base", base), shuffled))[1].comparison
    assert c.mcnemar_p == 1.0 and c.difference == 0 and c.shown is None  # not one discordant pair


def test_unfinished_cell_is_compared_on_the_training_seeds_that_both_have():
    full, part = solved(50, 60, 90), solved(90, rng=4)
    result = ablation(cell("full", full), cell("part", part, train_seeds=(1,)), failed={"part, seed 0": "killed"})
    c = summarise(result)[1].comparison
    assert c.train_seeds == (1,) and c.difference == pytest.approx(part.mean() - full[1].mean())
    assert '"part" has training seeds 1 of 0, 1, 2' in str(said(result))


def test_every_rate_of_the_main_table_has_its_interval():
    base = wilson_interval(50, 100)
    table = markdown_table(ablation(cell("a|b", solved(50))))
    assert f"50.0 % [{100 * base[0]:.1f}, {100 * base[1]:.1f}]" in table
    assert "a\\|b (baseline)" in table
    assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_oracle_stands_before_the_network_and_only_if_there_is_one():
    graded = dict(energy_distance=0.0123, energy_floor=0.0035, mode_weight_error=0.02, dispersion_ratio=0.31)
    header, _, row = markdown_table(ablation(cell("a", solved(50), oracle=graded))).splitlines()
    assert header.index("energy distance") < header.index("success")
    assert "| 0.0123 (0.0035) | 0.020 | 0.31 | 50.0 %" in row
    assert "energy distance" not in markdown_table(ablation(cell("a", solved(50))))


def test_diversity_is_a_column_with_its_interval_and_a_dash_where_it_was_not_measured(tmp_path):
    values = np.array([[0.2, 0.4, 0.6], [0.3, 0.5, 0.7]])
    result = ablation(
        cell("new", solved(50, 60), diversity=values, guidance={"task": 2.0}), cell("old", solved(50, 55))
    )
    new, old = table_rows(result, summarise(result))
    assert new["diversity"] == pytest.approx(0.45)
    assert (new["diversity_low"], new["diversity_high"]) == clustered_bootstrap_interval(values)
    assert 0.2 < new["diversity_low"] < 0.45 < new["diversity_high"] < 0.7
    assert (old["diversity"], old["diversity_low"], old["diversity_high"]) == (None, None, None)
    header, _, first, second = markdown_table(result).splitlines()
    at = header.split(" | ").index("diversity [95 %]")
    assert first.split(" | ")[at].startswith("0.450 [") and second.split(" | ")[at] == "-"
    text = page_of(result, tmp_path).text
    assert "Diversity: mean distance between two chunks" in text and "A dash: not measured" in text
    assert "one more row for each guided part" in text
    plain = ablation(*THREE.cells[:2])
    assert "iversity" not in page_of(plain, tmp_path).text and "iversity" not in markdown_table(plain)


def test_episodes_that_ignored_the_words_are_counted_where_there_are_goals(tmp_path):
    ignores = solved(10, 20)
    result = ablation(cell("a", solved(50, 60), ignores=ignores), cell("no goals", solved(50, 55)))
    rows = table_rows(result, summarise(result))
    assert [row["ignores"] for row in rows] == [pytest.approx(0.15), None]
    assert rows[0]["ignores_low"] < 0.15 < rows[0]["ignores_high"]
    assert "| 15.0 % [" in markdown_table(result) and "ignores" not in markdown_table(THREE)
    assert "Ignores: episodes that fulfilled a goal which the words did not name" in page_of(result, tmp_path).text
    episodes = pq.read_table(tmp_path / "episodes.parquet").to_pylist()
    assert sum(row["ignores"] for row in episodes if row["label"] == "a") == 30
    assert {row["ignores"] for row in episodes if row["label"] == "no goals"} == {None}


@pytest.mark.parametrize(
    "cells",
    [
        [cell("only", solved(7, starts=10))],
        [cell("one episode", [[True]])],
        [cell("a", np.ones((3, 20))), cell("b", np.ones((3, 20)))],
        [cell("a", np.zeros((1, 20))), cell("b", np.ones((1, 20)))],
        [cell("a", solved(50)), cell("copy", solved(50))],
    ],
    ids=["single cell", "single episode", "all succeed", "nothing against all", "ties"],
)
def test_report_of_an_odd_sweep_is_written_and_has_only_finite_numbers(cells, tmp_path):
    page = page_of(ablation(*cells), tmp_path)
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    assert "What the data say" in page.text


def test_all_success_everywhere_is_not_told_apart_with_an_interval_of_some_width():
    c = summarise(ablation(cell("a", np.ones((3, 20))), cell("b", np.ones((3, 20)))))[1].comparison
    assert c.verdict == "not told apart" and c.interval[0] < 0 < c.interval[1] and c.needed == np.inf


def test_words_of_a_user_are_text_and_not_markup(tmp_path):
    evil = '<script>alert("1")</script> & co'
    result = ablation(
        cell(evil, solved(50), labels=(evil,), axes={evil: evil}),
        cell("b", solved(60)),
        name=evil,
        question=evil,
        failed={evil: evil},
        described={evil: evil},
        duplicates={evil: evil},
    )
    page = page_of(result, tmp_path)
    assert page.text.count(evil) >= 10


def test_page_shows_warnings_failures_setting_and_smoke(tmp_path):
    result = dataclasses.replace(
        THREE,
        failed={"laplace": "worker died with signal 9"},
        duplicates={"kosinus": "cosine"},
        described=THREE.described | {"smoke": True},
    )
    text = page_of(result, tmp_path).text
    for words in (
        "SMOKE run",
        "Incomplete: 1 failed or missing",
        "laplace worker died with signal 9",
        "kosinus cosine",
        "[a] terminal signal 60 % linear",
        "command diffpolicy ablate noise.yaml",
        "versions torch 2.9",
        "finished training seeds 0, 1, 2",
        "finished environment seeds 100000 .. 100099 (100)",
        "finished 900 episodes in 3 cells",
    ):
        assert words in text
    assert "SMOKE" not in page_of(THREE, tmp_path).text


def test_tables_can_be_read_back_and_agree(tmp_path):
    write_report(THREE, tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        from_csv = list(csv.DictReader(file))
    from_parquet = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert (
        [row["label"] for row in from_csv] == [row["label"] for row in from_parquet] == ["cosine", "linear", "sigmoid"]
    )
    assert from_parquet == table_rows(THREE, summarise(THREE))
    linear = from_csv[1]
    assert float(linear["success"]) == pytest.approx(127 / 300) and linear["verdict"] == "worse"
    assert linear["success_per_train_seed"] == "0: 0.4000; 1: 0.4500; 2: 0.4200"
    assert float(linear["success_spread"]) == pytest.approx(np.std([0.40, 0.45, 0.42], ddof=1))
    assert from_csv[0]["difference"] == "" and from_csv[0]["verdict"] == "baseline"
    episodes = pq.read_table(tmp_path / "episodes.parquet").to_pylist()
    assert episodes == episode_rows(THREE) and len(episodes) == 900
    assert sum(row["success"] for row in episodes if row["label"] == "linear") == 127


def test_axis_of_words_and_numbers_is_a_column_of_one_type(tmp_path):
    a = cell("a", solved(50), axes={"steps": 4, "scale": 1, "nfe": "few", "ema": True})
    b = cell("b", solved(60), axes={"steps": "4, leading", "scale": 0.5, "nfe": "many", "ema": None})
    write_report(ablation(a, b), tmp_path)
    table = pq.read_table(tmp_path / "results.parquet").to_pydict()
    assert (table["steps"], table["scale"], table["ema"]) == (["4", "4, leading"], [1.0, 0.5], [True, None])
    assert table["axis nfe"] == ["few", "many"] and table["nfe"] == [10, 10]


def test_report_written_twice_is_the_same_to_the_byte(tmp_path):
    for folder in ("first", "second"):
        write_report(THREE, tmp_path / folder)
    first = {file.relative_to(tmp_path / "first"): file for file in (tmp_path / "first").rglob("*") if file.is_file()}
    assert len(first) >= 8
    for name, file in first.items():
        assert file.read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_figure_of_an_earlier_report_does_not_stay_behind(tmp_path):
    write_report(THREE, tmp_path)
    assert (tmp_path / "figures/differences.pdf").exists()
    write_report(ablation(THREE.cells[0]), tmp_path)
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["cells.pdf", "cells.png"]


def test_runs_that_cells_share_are_listed_once(tmp_path):
    run = {0: {"run": "train/abc", "minutes": 3.5, "steps": 8000}}
    shared = ablation(cell("4 calls", solved(50), train=run), cell("8 calls", solved(60), train=run))
    assert page_of(shared, tmp_path).text.count("train/abc") == 1
    assert table_rows(shared, summarise(shared))[0]["train_minutes"] == 3.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros((1, 3))}, r"cell 'x': scores must be \(S=1, E=10\), got \(1, 3\)"),
        ({"scores": np.full((1, 10), np.nan)}, r"scores must be in \[0, 1\], got nan for training seed 0 and environ"),
        ({"ignores": np.zeros((2, 10))}, r"cell 'x': ignores must be \(S=1, E=10\), got \(2, 10\)"),
        ({"diversity": np.zeros((2, 4))}, r"diversity must be \(S=1, O\) finite numbers >= 0, got shape \(2, 4\)"),
        ({"diversity": [[np.nan, 0.1]]}, r"diversity must be .* leave it out where it is not known"),
        ({"env_seeds": [7] * 10}, "env_seeds must differ from each other"),
    ],
)
def test_cell_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cell("x", solved(5, starts=10), **changes)


def test_ablation_without_cells_or_with_equal_labels_is_refused():
    with pytest.raises(ValueError, match="has no finished cell to report"):
        ablation()
    with pytest.raises(ValueError, match="different labels, got 'a' twice"):
        ablation(cell("a", solved(5)), cell("a", solved(6)))
    with pytest.raises(ValueError, match=r"baseline must be in \[0, 0\], got 3"):
        ablation(cell("a", solved(5)), baseline=3)


def test_scores_may_differ_where_success_is_too_rare_to_tell():
    """Push-T: hardly an episode succeeds, but one policy comes much nearer."""
    rng = np.random.default_rng(0)
    rare, near = solved(2, 1, 2), rng.uniform(0.6, 0.8, (3, 100))
    result = ablation(
        cell("cosine", rare, scores=near), cell("linear", rare, scores=near - rng.uniform(0.2, 0.4, (3, 100)))
    )
    (c,) = [s.comparison for s in summarise(result) if s.comparison]
    assert (c.verdict, c.score_verdict) == ("not told apart", "worse") and c.score_holm_p < 0.001
    words = said(result)
    assert words["Supported differences"] == ["No difference in success is supported."]
    assert words["Supported differences in score"][0].startswith('"linear" scores lower than "cosine": -0.3')
    (row,) = [row for row in table_rows(result, summarise(result)) if row["label"] == "linear"]
    assert row["score_verdict"] == "worse" and row["verdict"] == "not told apart"


def test_equal_scores_are_not_told_apart_and_the_number_that_would_is_said():
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.5, 0.9, (2, 60))
    noisy = np.clip(scores + rng.normal(0.005, 0.1, (2, 60)), 0, 1)
    words = said(ablation(cell("a", scores > 2, scores=scores), cell("b", scores > 2, scores=noisy)))
    (sentence,) = words["Not told apart in score"]
    assert re.search(
        r'n = 120 paired episodes cannot tell the scores of "b" and "a" apart .*about [\d,]+ would', sentence
    )
