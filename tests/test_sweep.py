"""Sweep files: which cells they mean, which network each needs, and what is said about a file that means nothing."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from diffpolicy.sweep import (
    SweepConfig,
    baseline_of,
    cell_config,
    cells_of,
    content_hash,
    identity,
    load_sweep,
    sweep_from_dict,
    training_config,
    training_part,
)

PLAIN = {
    "name": "schedules",
    "question": "Which schedule wins?",
    "base": ["conf/task/tabletop.yaml", "conf/process/ddim.yaml"],
    "set": {"train.steps": 40, "train": {"warmup_steps": 5}},
    "axes": {
        "process.schedule": ["cosine", "linear"],
        "steps": {
            4: {"sampler.num_inference_steps": 4},
            "DDPM": {"sampler.name": "ddpm", "sampler.num_inference_steps": 100},
        },
    },
}


def sweep(**changed) -> SweepConfig:
    return sweep_from_dict(PLAIN | changed)


def write(folder, **changed):
    OmegaConf.save(OmegaConf.create(PLAIN | changed), folder / "sweep.yaml")
    return folder / "sweep.yaml"


def test_cells_are_every_combination_with_the_last_axis_running_fastest():
    cells = cells_of(sweep())
    assert [tuple(cell.axes.values()) for cell in cells] == [
        ("cosine", 4),
        ("cosine", "DDPM"),
        ("linear", 4),
        ("linear", "DDPM"),
    ]
    assert [cell.label for cell in cells] == ["cosine, steps 4", "cosine, DDPM", "linear, steps 4", "linear, DDPM"]


def test_a_labelled_setting_sets_several_keys():
    s = sweep()
    config = cell_config(s, cells_of(s)[1], seed=7)
    assert (config.sampler.name, config.sampler.num_inference_steps, config.seed) == ("ddpm", 100, 7)
    assert (config.train.steps, config.train.warmup_steps) == (40, 5)


def test_a_labelled_setting_may_be_a_yaml_file():
    s = sweep(axes={"network": {"MLP": "conf/denoiser/mlp.yaml", "U-Net": ["conf/denoiser/unet_small.yaml"]}})
    assert [cell_config(s, cell, 0).denoiser.name for cell in cells_of(s)] == ["mlp", "unet"]


def test_options_of_another_member_are_dropped_and_those_of_the_chosen_kept_in_any_order():
    setting = {"denoiser.down_dims": [32, 64], "denoiser.name": "unet"}
    s = sweep(set={"denoiser.name": "mlp", "denoiser.width": 32}, axes={"network": {"U-Net": setting}})
    config = cell_config(s, cells_of(s)[0], 0)
    assert config.denoiser.name == "unet" and config.denoiser.options.down_dims == (32, 64)


def test_values_arrive_with_their_types():
    s = sweep(axes={"train.lr": [1e-05], "sampler.clip_sample": [None], "data.max_train_episodes": [5]})
    config = cell_config(s, cells_of(s)[0], 0)
    assert (config.train.lr, config.sampler.clip_sample, config.data.max_train_episodes) == (1e-05, None, 5)


def test_derived_horizons_follow_the_axis():
    s = sweep(axes={"horizons.obs": [1, 3]})
    assert [cell_config(s, cell, 0).horizons.past for cell in cells_of(s)] == [0, 2]


def test_excluded_combinations_are_left_out():
    cells = cells_of(sweep(exclude=[{"process.schedule": "cosine", "steps": [4]}]))
    assert [cell.label for cell in cells] == ["cosine, DDPM", "linear, steps 4", "linear, DDPM"]
    by_key = cells_of(sweep(exclude=[{"sampler.name": "ddpm"}]))
    assert [cell.label for cell in by_key] == ["cosine, steps 4", "linear, steps 4"]


def test_baseline_is_the_first_cell_that_fits():
    s = sweep(baseline={"process.schedule": "linear"})
    assert baseline_of(s, cells_of(s)) == 2
    assert baseline_of(sweep(), cells_of(sweep())) == 0
    gone = sweep(baseline={"steps": 4}, exclude=[{"steps": 4}])
    with pytest.raises(ValueError, match=r"baseline \{'steps': 4\} is excluded"):
        baseline_of(gone, cells_of(gone))


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"axess": {}}, "sweep key 'axess' must be one of .* Did you mean 'axes'"),
        ({"exclude": [{"process.shedule": "linear"}]}, "axis in exclude must be .* Did you mean 'process.schedule'"),
        ({"exclude": [{"process.schedule": "liner"}]}, "exclude: process.schedule must be .* Did you mean 'linear'"),
        ({"baseline": {"step": 4}}, "axis in baseline must be .* Did you mean 'steps'"),
        ({"compare": {"step": 4}}, "axis in compare must be .* Did you mean 'steps'"),
        ({"axes": {"steps": {"a": 3}}}, "axes.steps.a must be .* got 3"),
        ({"axes": {"train.lr": 3}}, "axes.train.lr must be a list of values"),
        ({"axes": {"train.lr": [1, 1]}}, "axes.train.lr holds 1 twice"),
        ({"axes": {"seed": [1, 2]}}, "training seeds are no axis: write seeds"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"episodes": "many"}, "episodes must be a whole number, got 'many'"),
        ({"set": {"process.schedule": "cosine"}}, "process.schedule is set for every cell and is an axis too"),
        ({"name": "../x"}, "name must be one folder name"),
        ({"collect": {"env": "tabletop"}}, "collect needs 'episodes'"),
        ({"base": []}, "base must name at least one YAML file"),
        ({"base": None}, "a sweep needs 'base'"),
        ({"axes": None}, "a sweep needs 'axes'"),
        ({"oracle": {"problm": "ring"}}, r"sweep key 'oracle.problm' must be one of .* Did you mean 'problem'"),
        ({"oracle": {"problem": "rings"}}, r"oracle.problem must be one of .* Did you mean 'ring'"),
        ({"oracle": {"num_samples": "many"}}, r"oracle.num_samples must be a whole number, got 'many'"),
        ({"oracle": {"num_samples": 1}}, r"oracle.num_samples must be at least 2, got 1"),
        ({"oracle": {"error": -0.1}}, r"oracle.error must not be negative"),
    ],
)
def test_a_wrong_sweep_says_what_and_how_to_mend_it(changed, said):
    with pytest.raises(ValueError, match=said):
        sweep(**changed)


def test_two_axes_that_set_one_key_are_refused():
    with pytest.raises(ValueError, match=r"sets train\.lr, as another axis does"):
        cells_of(sweep(axes={"train.lr": [1e-3], "recipe": {"slow": {"train.lr": 1e-4}}}))


@pytest.mark.parametrize(
    "axis, said",
    [("process.scheduel", "Did you mean 'schedule'"), ("proces.schedule", "Did you mean 'process'")],
)
def test_an_axis_that_is_no_config_key_gets_the_nearest_key(axis, said):
    s = sweep(axes={axis: ["cosine"]})
    with pytest.raises(ValueError, match=said) as raised:
        cell_config(s, cells_of(s)[0], 0)
    assert "command line" not in str(raised.value)


def test_smoke_merges_settings_key_by_key_and_picks_labels(tmp_path):
    short = {
        "seeds": [3],
        "episodes": 2,
        "set": {"train.steps": 9},
        "axes": {"steps": [4], "process.schedule": ["linear"]},
    }
    file = write(tmp_path, seeds=[0, 1], baseline={"process.schedule": "cosine"}, smoke=short)
    smoke = load_sweep(file, smoke=True)
    assert (smoke.seeds, smoke.episodes, smoke.is_smoke) == ((3,), 2, True)
    assert smoke.set == {"train.steps": 9, "train.warmup_steps": 5}
    assert [cell.label for cell in cells_of(smoke)] == ["linear, steps 4"]
    assert baseline_of(smoke, cells_of(smoke)) == 0
    full = load_sweep(file)
    assert full.seeds == (0, 1) and len(cells_of(full)) == 4 and not full.is_smoke


def test_smoke_can_stand_on_another_base_with_data_of_its_own(tmp_path):
    short = {"base": ["conf/task/tabletop.yaml"], "collect": {"env": "tabletop", "episodes": 3}}
    file = write(tmp_path, base=["conf/task/pusht_keypoint.yaml"], smoke=short)
    assert load_sweep(file).collect is None
    smoke = load_sweep(file, smoke=True)
    assert smoke.base == ("conf/task/tabletop.yaml",) and smoke.collect["episodes"] == 3
    assert load_sweep(file, smoke=True, data="mine.zarr").collect is None


@pytest.mark.parametrize(
    "short, said",
    [
        (None, "--smoke needs a `smoke:` section"),
        ({"step": 3}, "sweep key 'smoke.step' must be one of"),
        ({"axes": {"step": [4]}}, "axis in smoke.axes must be .* Did you mean 'steps'"),
        ({"axes": {"steps": [8]}}, "smoke.axes.steps must be one of"),
        ({"episodes": 0}, "episodes must be at least 1"),
    ],
)
def test_a_wrong_smoke_section_is_refused(tmp_path, short, said):
    with pytest.raises(ValueError, match=said):
        load_sweep(write(tmp_path, smoke=short), smoke=True)


def test_settings_of_the_command_line_reach_config_and_sweep(tmp_path):
    s = load_sweep(write(tmp_path), ["train.steps=60", "seeds=[4,5]", "episodes=7"], data="x.zarr")
    assert (s.seeds, s.episodes, s.set["train.steps"], s.set["data.path"]) == ((4, 5), 7, 60, "x.zarr")
    with pytest.raises(ValueError, match=r"an axis sets process\.schedule already"):
        load_sweep(write(tmp_path), ["process.schedule=cosine"])
    with pytest.raises(ValueError, match="must read key=value"):
        load_sweep(write(tmp_path), ["train.steps"])
    with pytest.raises(ValueError, match=r"'seeds=\[0,1' is not readable as key=value"):
        load_sweep(write(tmp_path), ["seeds=[0,1"])


def test_only_what_trains_decides_the_network():
    s = sweep()
    cells = cells_of(s)
    parts = [training_part(training_config(s, cell, 0), "data") for cell in cells]
    assert parts[0] == parts[1] != parts[2]
    other = sweep(set=PLAIN["set"] | {"env.max_steps": 5, "sampler.clip_sample": None, "task": "x", "data.path": "y"})
    assert training_part(training_config(other, cells[0], 3), "data") == parts[0]
    assert training_part(training_config(s, cells[0], 0), "other data") != parts[0]


def test_cells_that_execute_more_or_less_share_one_network():
    s = sweep(axes={"horizons.act": [2, 4, 8]})
    cells = cells_of(s)
    trained = [training_config(s, cell, 0) for cell in cells]
    assert trained[0] == trained[1] == trained[2]
    assert trained[0].horizons.act == 8 and cell_config(s, cells[0], 0).horizons.act == 2


def test_a_shorter_prediction_trains_with_the_largest_number_of_actions_that_fits():
    s = sweep(axes={"horizons.pred": [4], "horizons.act": [1, 2]})
    one, two = (training_config(s, cell, 0) for cell in cells_of(s))
    assert one == two and one.horizons.act == 3


def test_hash_tells_values_apart_but_not_the_order_of_keys():
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) != content_hash({"a": 1, "b": [3]})


def test_a_sweep_is_the_same_wherever_its_data_lie_and_whatever_it_asks():
    one = sweep(set={"data.path": "a.zarr"})
    assert identity(one) == identity(dataclasses.replace(one, set={"data.path": "b.zarr"}, question="?"))
    assert identity(one) != identity(dataclasses.replace(one, episodes=3))


def test_sweep_file_that_is_not_there_gets_a_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_sweep(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load_sweep(tmp_path / "broken.yaml")


def test_cells_are_compared_with_the_same_settings_at_another_value():
    from diffpolicy.ablation_cells import CellResult
    from diffpolicy.ablation_plan import references_of

    cells = [
        CellResult(
            label=f"{schedule} {steps}",
            axes={"process.schedule": schedule, "steps": steps},
            train_seeds=(0,),
            env_seeds=(1,),
            scores=[[0.5]],
            successes=[[False]],
            nfe=steps,
            call_ms=1.0,
        )
        for schedule in ("cosine", "linear")
        for steps in (4, 10)
    ]
    compared = references_of(cells, {"process.schedule": "cosine"})
    assert compared == {"linear 4": "cosine 4", "linear 10": "cosine 10"}
    assert references_of(cells[1:], {"process.schedule": "cosine"}) == {
        "linear 10": "cosine 10"
    }  # the other is missing
    assert references_of(cells, {}) == {}
