"""The config tree: every shipped file builds, every slip is named with its place and the nearest right word."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from diffpolicy.config import (
    FAMILIES,
    Config,
    build_policy,
    changed_sampler,
    choose,
    config_from_dict,
    find_yaml,
    load_config,
    shipped_conf,
)
from diffpolicy.envs import make_env
from diffpolicy.policies import DiffusionPolicy
from diffpolicy.processes import SamplerConfig
from diffpolicy.spec import DataSpec, FieldSpec

CONF = shipped_conf()
TASKS = sorted(p.stem for p in (CONF / "task").glob("*.yaml"))
DENOISERS = sorted(p.stem for p in (CONF / "denoiser").glob("*.yaml"))
PROCESSES = sorted(p.stem for p in (CONF / "process").glob("*.yaml"))
FITTING = [(task, denoiser) for task in TASKS for denoiser in DENOISERS if ("image" in task) == ("image" in denoiser)]
TABLETOP = "conf/task/tabletop.yaml"


def build_without_memory(config: Config) -> DiffusionPolicy:
    """The policy for what the task's own environment gives; weights have shapes but no numbers."""
    env = make_env(config.env.name, **{k: v for k, v in config.env.to_dict().items() if k != "name"})
    shapes = {key: space.shape for key, space in env.observation_space.spaces.items()}
    shapes["action"] = env.action_space.shape
    env.close()
    fields = {role: FieldSpec(shape=shapes[role], dtype="float32") for role in config.data.keys}
    with torch.device("meta"):
        return build_policy(config, DataSpec(fields=fields))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


# --- what is shipped ---


def test_there_is_a_shipped_file_for_every_kind():
    assert TASKS and DENOISERS and PROCESSES


@pytest.mark.parametrize("task", TASKS)
def test_shipped_task_builds_a_policy_for_what_its_environment_gives(task):
    config = load_config([f"conf/task/{task}.yaml"])
    assert config.task == task
    policy = build_without_memory(config)
    assert policy.horizons == config.horizons
    assert policy.sampler.num_inference_steps <= getattr(policy.process, "num_train_timesteps", 1000)


@pytest.mark.parametrize(("task", "denoiser"), FITTING)
def test_shipped_denoiser_stacks_on_every_task(task, denoiser):
    config = load_config([f"conf/task/{task}.yaml", f"conf/denoiser/{denoiser}.yaml"])
    assert config.denoiser.name == denoiser.split("_")[0]
    assert count(build_without_memory(config)) > 0


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("task", TASKS)
def test_shipped_process_stacks_on_every_task(task, process):
    config = load_config([f"conf/task/{task}.yaml", f"conf/process/{process}.yaml"])
    policy = build_without_memory(config)
    assert policy.sampler.name == {"ddpm": "ddpm", "ddim": "ddim", "flow": "euler"}[process]
    assert config.process.name == ("flow" if process == "flow" else "diffusion")


def test_reference_recipes_have_the_published_numbers_of_parameters():
    assert count(build_without_memory(load_config(["conf/task/pusht_state.yaml"]))) == 65_783_298
    stacked = load_config(["conf/task/pusht_state.yaml", "conf/denoiser/transformer.yaml"])
    assert count(build_without_memory(stacked).denoiser) == 8_965_122
    image = build_without_memory(load_config(["conf/task/pusht_image.yaml"]))
    assert image.encoder.cond.global_dim == 2 * (64 + 2)
    assert count(image.denoiser) == 251_511_938


def test_reference_recipes_train_as_published():
    unet = load_config(["conf/task/pusht_state.yaml"])
    assert (unet.train.batch_size, unet.train.lr, unet.train.weight_decay) == (256, 1e-4, 1e-6)
    assert (unet.train.betas, unet.train.warmup_steps, unet.train.ema_max) == ((0.95, 0.999), 500, 0.9999)
    assert (unet.horizons.obs, unet.horizons.pred, unet.horizons.act, unet.horizons.past) == (2, 16, 8, 1)
    assert (unet.data.max_train_episodes, unet.data.split_seed, unet.data.val_ratio) == (90, 42, 0.02)
    assert (unet.sampler.name, unet.sampler.num_inference_steps, unet.sampler.clip_sample) == ("ddpm", 100, 1.0)
    transformer = load_config(["conf/task/pusht_state.yaml", "conf/denoiser/transformer.yaml"])
    assert (transformer.train.betas, transformer.train.weight_decay) == ((0.9, 0.95), 0.1)
    assert transformer.train.warmup_steps == 1000


# --- stacking ---


@pytest.mark.parametrize("task", TASKS)
def test_config_comes_back_from_its_own_json(task):
    config = load_config([f"conf/task/{task}.yaml"], ["seed=7", "train.betas=[0.8,0.9]"])
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_later_files_and_overrides_win(tmp_path):
    first = write(tmp_path, "a.yaml", "seed: 1\ntrain: {steps: 10, warmup_steps: 2}\n")
    second = write(tmp_path, "b.yaml", "train: {steps: 20}\n")
    assert load_config([first, second]).train.steps == 20
    assert load_config([second, first]).train.steps == 10
    config = load_config([first, second], ["train.steps=30", "seed=5"])
    assert (config.train.steps, config.train.warmup_steps, config.seed) == (30, 2, 5)


def test_another_member_of_a_family_drops_the_options_of_the_old_one(tmp_path):
    base = write(tmp_path, "a.yaml", "denoiser: {name: mlp, width: 64}\n")
    unet = load_config([base], ["denoiser.name=unet", "denoiser.kernel_size=3"])
    assert unet.denoiser.options.kernel_size == 3 and not hasattr(unet.denoiser.options, "width")
    assert load_config([base], ["denoiser=unet"]).denoiser.name == "unet"


@pytest.mark.parametrize("again", ["denoiser.name=mlp", "denoiser=mlp", "denoiser.depth=3"])
@pytest.mark.parametrize("text", ["denoiser: {name: mlp, width: 64}", "denoiser: {width: 64}"])
def test_the_same_member_keeps_its_options(tmp_path, text, again):
    assert load_config([write(tmp_path, "a.yaml", text)], [again]).denoiser.options.width == 64


def test_options_of_an_environment_may_come_before_its_name():
    config = load_config([], ["env.pixels=true", "env.name=pusht"])
    assert config.env.name == "pusht" and config.env.options.pixels is True


def test_no_environment_is_a_choice():
    assert load_config([TABLETOP], ["env=null"]).env is None


def test_empty_config_has_defaults_from_every_family(tmp_path):
    config = load_config([write(tmp_path, "empty.yaml", "")])
    for section in ("encoder", "denoiser", "process"):
        choice = getattr(config, section)
        assert isinstance(choice.options, FAMILIES[section][choice.name][0])


@pytest.mark.parametrize("text", ["observation.state: a[0:2]", "observation: {state: 'a[0:2]'}"])
def test_roles_with_dots_and_nested_roles_are_the_same(tmp_path, text):
    file = write(tmp_path, "a.yaml", f"data:\n  keys:\n    {text}\n    action: act\n")
    assert load_config([file]).data.keys == {"observation.state": "a[0:2]", "action": "act"}
    assert load_config([file], ["data.keys.observation.state=b"]).data.keys["observation.state"] == "b"


def test_overrides_take_the_type_of_what_they_override():
    overrides = [
        "train.lr=3e-4",
        "train.betas=[0.9,0.95]",
        "train.grad_clip=null",
        "sampler.clip_sample=null",
        "denoiser.name=unet",
        "denoiser.down_dims=[8,16]",
        "denoiser.cond_predict_scale=false",
        "data.max_train_episodes=3",
        "data.path=some/where.zarr",
    ]
    config = load_config([TABLETOP], overrides)
    assert config.train.lr == 3e-4 and config.train.betas == (0.9, 0.95) and config.train.grad_clip is None
    assert config.sampler.clip_sample is None and config.denoiser.options.down_dims == (8, 16)
    assert config.denoiser.options.cond_predict_scale is False and config.data.max_train_episodes == 3
    assert config.data.path == "some/where.zarr"


def test_values_may_refer_to_each_other(tmp_path):
    file = write(tmp_path, "a.yaml", "seed: 5\ndata: {split_seed: '${seed}'}\n")
    assert load_config([file]).data.split_seed == 5


# --- slips ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=3", r"'trian' \(in command line: trian.steps=3\) must be one of .* Did you mean 'train'\?"),
        ("train.stesp=3", r"'train.stesp' .* must be one of .* Did you mean 'steps'\?"),
        ("denoiser.widht=3", r"'denoiser.widht' \(in command line: denoiser.widht=3\) .* Did you mean 'width'\?"),
        ("env.pixel=true", r"'env.pixel' .* must be one of"),
        ("denoiser.name=unett", r"denoiser.name \(in command line: .*\) must be one of .* Did you mean 'unet'\?"),
        ("process.schedule=cosine", r"'process.schedule' .* must be one of"),  # an option of diffusion, not of flow
        (
            "sampler.name=direct",
            r"sampler.name=direct cannot sample process.name=flow; it takes auto or one of \['euler', 'heun', ",
        ),
        ("policy=diffusio", r"policy must be one of .* Did you mean 'diffusion'\?"),
        (
            "train.lr=fast",
            r"train.lr: Value 'fast' .* could not be converted to Float \(in command line: train.lr=fast\)",
        ),
        ("train.steps=1.5", r"train.steps: .* could not be converted to Integer"),
        ("denoiser.width=-3", r"denoiser.width must be at least 1, got -3 \(in command line: denoiser.width=-3"),
        (
            "horizons.act=40",
            r"horizons.act must be in \[1, horizons.pred - horizons.past = 15\], got 40 \(in command line",
        ),
        ("train.betas=[0.9]", r"train.*length"),
        ("seed=1.5", r"seed must be int, got 1.5"),
        ("task=3", r"task must be str, got 3"),
        ("train=3", r"train must be a section, got 3"),
        ("denoiser=3", r"denoiser must be a section with a name, got 3"),
        ("data.keys=[a]", r"data: .* \(in command line: data.keys=\[a\]\)"),
        ("seed", r"an override must read key=value, got 'seed'"),
        ("train.steps=[3", r"'train.steps=\[3' is not readable as key=value"),
    ],
)
def test_slip_on_the_command_line_is_named_in_one_line(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config([TABLETOP], [override])
    assert "\n" not in str(caught.value)


def test_slip_in_a_file_names_the_file(tmp_path):
    good = write(tmp_path, "good.yaml", "denoiser: {name: mlp}\n")
    bad = write(tmp_path, "bad.yaml", "denoiser: {widht: 3}\n")
    with pytest.raises(ValueError, match=r"'denoiser.widht' \(in .*bad.yaml\) .* Did you mean 'width'\?"):
        load_config([good, bad])
    wrong = write(tmp_path, "wrong.yaml", "train: {lr: -1}\n")
    with pytest.raises(ValueError, match=r"train.lr must be positive, got -1.0 \(in .*wrong.yaml\)"):
        load_config([wrong])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not readable as YAML"),
        ("seed: ${nothing}", "is not readable as YAML: .*nothing"),
        ("- 1\n- 2\n", "must hold `key: value` lines, got a list"),
    ],
)
def test_file_that_is_no_config_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"bad.yaml {message}") as caught:
        load_config([write(tmp_path, "bad.yaml", text)])
    assert "\n" not in str(caught.value)


def test_missing_file_suggests_the_nearest_shipped_one():
    with pytest.raises(
        FileNotFoundError, match=r"'conf/task/tabeltop.yaml' .*Did you mean 'conf/task/tabletop.yaml'\?"
    ):
        load_config(["conf/task/tabeltop.yaml"])


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_yaml(TABLETOP) == find_yaml("task/tabletop.yaml") == CONF / "task" / "tabletop.yaml"
    (tmp_path / "conf" / "task").mkdir(parents=True)
    own = write(tmp_path / "conf" / "task", "tabletop.yaml", "task: own\n")
    assert find_yaml(TABLETOP).resolve() == own  # a file that is here comes first


def test_choice_from_texts_is_checked_like_a_file():
    assert choose("env", "pusht", ["pixels=true"]).options.pixels is True
    assert choose("denoiser", "mlp", {"width": 8}).to_dict()["width"] == 8
    assert choose("denoiser", "unet", ["kernel_size=3", "down_dims=[8,16]"]).options.down_dims == (8, 16)
    for name, options, message in (
        ("mpl", [], r"denoiser must be one of .* got 'mpl'. Did you mean 'mlp'\?"),
        ("mlp", ["widht=3"], "'denoiser.widht' must be one of .* Did you mean 'width'"),
        ("mlp", ["width"], "an option of denoiser must read key=value, got 'width'"),
        ("mlp", ["width=[3"], "is not readable as key=value"),
    ):
        with pytest.raises(ValueError, match=message):
            choose("denoiser", name, options)


def test_normaliser_modes_follow_the_config():
    config = load_config(
        [], ["normalizer.action=quantile", "normalizer.observation=gaussian", "normalizer.range_floor=0.5"]
    )
    fields = {key: FieldSpec(shape=(2,), dtype="float32") for key in ("observation.state", "action")}
    normalizer = build_policy(config, DataSpec(fields=fields)).normalizer
    assert normalizer.modes == {"action": "quantile", "observation.state": "gaussian"}
    assert normalizer.range_floor == 0.5


def test_null_takes_back_a_key_of_an_earlier_file():
    config = load_config(["conf/task/tabletop.yaml"], ["data.keys.observation.goal=null"])
    assert "observation.goal" not in config.data.keys and "observation.state" in config.data.keys


# --- settings of a sampler at run time ---


def test_sampler_options_are_checked_like_a_config_file():
    options = ["temperature=0.5", "timesteps=[99,50,10]", "clip_sample=null"]
    changed = changed_sampler(SamplerConfig(num_inference_steps=4), options)
    assert changed == SamplerConfig(num_inference_steps=4, temperature=0.5, timesteps=(99, 50, 10), clip_sample=None)
    assert changed_sampler(changed, ["spacing=leading"]).timesteps is None  # a new grid takes back the explicit one
    for option, said in (
        ("temp=1", "config key 'sampler.temp' must be one of .* Did you mean 'temperature'"),
        ("temperature=warm", "sampler.temperature: .*warm"),
        ("eta", "an option of sampler must read key=value, got 'eta'"),
        ("timesteps=[1,2]", "sampler.timesteps must be a falling list of times"),
    ):
        with pytest.raises(ValueError, match=said):
            changed_sampler(SamplerConfig(), [option])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["num_inference_steps=4", "num_inference_steps=8"], "sampler.num_inference_steps is given twice: 4 and .*=8"),
        (["num_inference_steps=4", "timesteps=[99,50]"], "give it or sampler.num_inference_steps, not both"),
        (["timesteps=[99,50]", "spacing=leading"], "give it or sampler.spacing, not both"),
    ],
)
def test_sampler_options_that_contradict_each_other_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        changed_sampler(SamplerConfig(), options)


def test_schedule_table_travels_in_the_config_and_needs_its_file_no_more(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("t,alpha_bar\n0,1\n1,0.001\n")
    settings = ["process.schedule=table", f"process.schedule_file={file}"]
    config = load_config(["conf/task/tabletop.yaml", "conf/process/ddim.yaml"], settings)
    file.unlink()
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.process.options.table == ((0.0, 1.0), (1.0, 0.001))


@pytest.mark.parametrize(
    ("denoiser", "encoder", "said"),
    [
        (
            "{name: mlp}",
            "{text: tokens}",
            ["encoder.text=tokens is seen as pooled: denoiser.name=mlp takes one vector"],
        ),
        ("{name: unet}", "{text: pooled}", []),
        (
            "{name: dit, fusion: adaln}",
            "{text: tokens}",
            ["denoiser.name=dit with denoiser.fusion=adaln takes one vector"],
        ),
        ("{name: dit, fusion: readout}", "{text: tokens}", []),
        ("{name: transformer}", "{text: tokens}", []),
    ],
)
def test_tokens_that_no_denoiser_looks_at_are_said_aloud(tmp_path, denoiser, encoder, said):
    yaml = tmp_path / "words.yaml"
    yaml.write_text(f"encoder: {encoder}\ndenoiser: {denoiser}\n")
    config = load_config([find_yaml("conf/task/pusht_language.yaml"), yaml])
    fields = {
        "observation.state": FieldSpec(shape=(2,), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    }
    with torch.device("meta"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_policy(config, DataSpec(fields=fields))
    heard = [str(w.message) for w in caught if "tokens" in str(w.message)]
    assert len(heard) == len(said)
    for got, wanted in zip(heard, said, strict=True):
        assert wanted in got
