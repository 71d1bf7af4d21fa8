"""Features computed once: written whole or not at all, the same numbers as the tower's, refused when stale."""

import io
import signal
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from diffpolicy import train as trainer
from diffpolicy.checkpoint import load_policy
from diffpolicy.cli_data import app
from diffpolicy.config import build_policy, config_from_dict
from diffpolicy.embed import embed, embedded_windows, hash_of_weights, require_same_tower
from diffpolicy.embedding_store import GROUP, open_embedding
from diffpolicy.encoders.clip_weights import known_models
from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import GOAL_IMAGE, FieldSpec
from diffpolicy.store_folder import list_files
from diffpolicy.validation import validate
from diffpolicy.windows import load_windows

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
KEYS = {TOP: "top", WRIST: "wrist", STATE: "state", "action": "action", GOAL_IMAGE: "top"}
LENGTHS = (7, 11, 9)
FRAMES = sum(LENGTHS)
SIZES = {"top": (40, 48), "wrist": (32, 32)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two random CLIPs that stand for ones trained elsewhere."""
    known_models()
    folder = tmp_path_factory.mktemp("clip")
    for seed in (5, 6):
        torch.manual_seed(seed)
        torch.save(open_clip.create_model("diffpolicy-tiny").state_dict(), folder / f"clip_{seed}.pt")
    return folder


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "demos.zarr")


def make_store(path):
    fields = {
        **{key: FieldSpec(shape=(*size, 3), dtype="uint8") for key, size in SIZES.items()},
        "state": FieldSpec(shape=(2,), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    }
    with ReplayBuffer.create(path, fields=fields, fps=10) as buffer:
        for i, length in enumerate(LENGTHS):
            buffer.append_episode(episode(i, length), task="walk")
    return path


def episode(seed, length):
    rng = np.random.default_rng(seed)
    pictures = {key: rng.integers(0, 256, (length, *size, 3), np.uint8) for key, size in SIZES.items()}
    return pictures | {key: rng.normal(size=(length, 2)).astype(np.float32) for key in ("state", "action")}


def config_for(weights, store="", *, keys=KEYS, data=None, **encoder):
    steps = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "val_every": 2, "log_every": 1, "checkpoint_every": 2}
    chosen = {"name": "clip", "pretrained": str(weights / "clip_5.pt"), "tuning": "frozen", "token_dim": 16}
    return config_from_dict(
        {
            "task": "seen",
            "data": {"path": str(store), "keys": keys, "val_ratio": 0.3, **(data or {})},
            "horizons": {"obs": 2, "pred": 8, "act": 4},
            "encoder": chosen | {"crop_ratio": None} | encoder,
            "denoiser": {"name": "mlp", "width": 16, "depth": 1, "embed_dim": 8},
            "process": {"name": "flow"},
            "sampler": {"num_inference_steps": 2},
            "train": {**steps, "val_windows": 8},
        }
    )


def quiet():
    return Console(file=io.StringIO())


def embed_quietly(store, config, **choices):
    return embed(store, config, device="cpu", console=quiet(), **choices)


def conditions(store, config):
    """The condition of the same windows from pixels, and from the features in the store."""
    buffer, splits = ReplayBuffer.open(store), [range(len(LENGTHS))]
    (live,), spec = load_windows(buffer, config.data.keys, config.horizons, splits)
    embedded = embedded_windows(config, buffer)
    (cached,), same_spec = load_windows(buffer, config.data.keys, config.horizons, splits, embedded=embedded)
    assert same_spec == spec
    torch.manual_seed(0)
    policy = build_policy(config, spec)
    for key in (STATE, "action"):
        policy.normalizer.fit(key, live.arrays[key])
    require_same_tower(policy.encoder, store)
    windows = torch.arange(0, len(live), 3)
    with torch.no_grad():
        return [policy.eval().encode(dataset.batch(windows).obs) for dataset in (live, cached)]


# --- the same numbers ---


@pytest.mark.parametrize(
    "encoder",
    [
        {},
        {"image": "patch_tokens", "crop_ratio": 0.8},
        {"image": "all_layers", "image_layers": [0, -1]},
        {"image": "perceiver", "num_image_tokens": 3, "square_crop": True},
    ],
)
@pytest.mark.filterwarnings("ignore:data.embedded=true")
def test_condition_from_features_is_that_from_pixels(store, weights, encoder):
    config = config_for(weights, store, **encoder)
    embed_quietly(store, config, batch_size=5)
    live, cached = conditions(store, config)
    torch.testing.assert_close(cached.global_cond, live.global_cond, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached.tokens, live.tokens, atol=1e-5, rtol=1e-5)


def test_half_precision_halves_the_room_and_keeps_three_digits(store, weights):
    config = config_for(weights, store, image="patch_tokens")
    whole = embed_quietly(store, config)
    half = embed_quietly(store, config, dtype="float16")
    assert whole.num_bytes == 2 * half.num_bytes == 4 * 2 * FRAMES * (64 + 64 * 64)
    live, cached = conditions(store, config)
    torch.testing.assert_close(cached.tokens, live.tokens, atol=5e-3, rtol=5e-3)


def test_features_of_patches_serve_a_policy_that_wants_the_pooled_vector_alone(store, weights):
    embed_quietly(store, config_for(weights, image="patch_tokens"))
    live, cached = conditions(store, config_for(weights, store))
    torch.testing.assert_close(cached.global_cond, live.global_cond, atol=1e-5, rtol=1e-5)


def test_goal_image_shares_the_features_of_its_camera(store, weights):
    config = config_for(weights, store)
    assert embed_quietly(store, config).keys == ("top", "wrist")
    buffer = ReplayBuffer.open(store)
    embedded = embedded_windows(config, buffer)
    (cached,), _ = load_windows(buffer, config.data.keys, config.horizons, [[0]], embedded=embedded)
    goal, top = cached.arrays[f"embedding.{GOAL_IMAGE}.pooled"], cached.arrays[f"embedding.{TOP}.pooled"]
    assert goal is top
    batch = cached.batch(torch.tensor([0]))
    torch.testing.assert_close(batch.obs[f"embedding.{GOAL_IMAGE}.pooled"][0, 0], top[LENGTHS[0] - 1])
    assert not any(key in batch.obs for key in (TOP, WRIST, GOAL_IMAGE))  # no pixels were read


# --- training ---


def test_training_on_features_never_runs_the_image_tower_and_rollout_does(store, weights, tmp_path, monkeypatch):
    config = config_for(weights, store, data={"embedded": True})
    embed_quietly(store, config)
    calls = []
    built = open_clip.transformer.VisionTransformer.forward
    monkeypatch.setattr(
        open_clip.transformer.VisionTransformer, "forward", lambda self, x: (calls.append(len(x)), built(self, x))[1]
    )
    run = trainer.train(config, runs=tmp_path / "runs", name="run", device="cpu", console=quiet())
    assert calls == []
    policy = load_policy(run)
    assert policy.spec.fields[TOP] == FieldSpec(shape=(40, 48, 3), dtype="uint8")
    obs = {key: torch.zeros(1, 2, *policy.spec.fields[key].shape, dtype=torch.uint8) for key in (TOP, WRIST)}
    obs |= {GOAL_IMAGE: torch.zeros(1, 1, 40, 48, 3, dtype=torch.uint8), STATE: torch.zeros(1, 2, 2), "task": ["walk"]}
    policy.sample_actions(obs)
    assert calls == [2 + 2 + 1]


def test_run_on_features_is_resumed_to_the_bit(store, weights, tmp_path):
    config = config_for(weights, store, data={"embedded": True}, image="attention_pool", num_image_tokens=2)
    embed_quietly(store, config)
    choices = {"device": "cpu", "console": quiet()}
    whole = trainer.train(config, runs=tmp_path, name="whole", **choices)
    broken = trainer.train(config, runs=tmp_path, name="broken", stop_at=2, **choices)
    trainer.train(trainer.load_resume_config(broken), resume=broken, **choices)
    ends = [load_policy(run).state_dict() for run in (whole, broken)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_centre_crop_in_training_is_said_aloud(store, weights):
    config = config_for(weights, store, crop_ratio=0.9)
    embed_quietly(store, config)
    with pytest.warns(UserWarning, match=r"encoder\.crop_ratio=0\.9 means the centre crop, also in training"):
        embedded_windows(config, ReplayBuffer.open(store))


# --- what is refused ---


def test_store_without_features_says_how_to_make_them(store, weights):
    with pytest.raises(
        ValueError, match=r"has no features of its cameras; make them anew: diffpolicy data embed .*demos"
    ):
        embedded_windows(config_for(weights, store), ReplayBuffer.open(store))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"pretrained": "clip_6.pt"}, "made with weights_sha256 "),
        ({"crop_ratio": 0.9}, r"made with crop \{.*'crop_ratio': None"),
        ({"square_crop": True}, "made with crop"),
        ({"image_size": 96}, "made with "),
        ({"image_layers": [1]}, r"made with layers \[2\], the policy has \[1\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:data.embedded=true")
def test_features_of_another_tower_crop_or_layer_are_refused(store, weights, other, what):
    embed_quietly(store, config_for(weights, image="attention_pool"))
    if "pretrained" in other:
        other = {"pretrained": str(weights / other["pretrained"])}
    with pytest.raises(ValueError, match=rf"(?s){what}.*make them anew: diffpolicy data embed"):
        conditions(store, config_for(weights, store, image="attention_pool", **other))


def test_patches_that_were_not_kept_are_named(store, weights):
    embed_quietly(store, config_for(weights))
    with pytest.raises(ValueError, match="has no patches of top among its features; make them anew"):
        conditions(store, config_for(weights, store, image="patch_tokens"))


def test_camera_that_was_not_looked_at_is_named(store, weights):
    embed_quietly(store, config_for(weights, keys={k: v for k, v in KEYS.items() if k != WRIST}))
    with pytest.raises(ValueError, match=r"has features of \['top'\], not of wrist; make them anew"):
        conditions(store, config_for(weights, store))


def test_features_are_stale_once_an_episode_is_added_and_can_be_made_anew(store, weights):
    config = config_for(weights, store)
    embed_quietly(store, config)
    with ReplayBuffer.open(store, "a") as buffer:
        buffer.append_episode(episode(9, 6), task="walk")
    with pytest.raises(ValueError, match="has changed since the features of top were made; make them anew"):
        embedded_windows(config, ReplayBuffer.open(store))
    assert embed_quietly(store, config).num_frames == FRAMES + 6
    assert len(embedded_windows(config, ReplayBuffer.open(store))[TOP]["pooled"]) == FRAMES + 6


def test_other_pictures_of_the_same_number_make_features_stale(store, weights, tmp_path):
    embed_quietly(store, config_for(weights))
    other = make_store(tmp_path / "other.zarr")
    with ReplayBuffer.open(other, "a") as buffer:
        buffer._arrays["top"][FRAMES // 2] = 0  # one frame is black; FRAMES are fewer than are compared
    (store / GROUP).rename(other / GROUP)
    with pytest.raises(ValueError, match="has changed since the features of top"):
        embedded_windows(config_for(weights, other), ReplayBuffer.open(other))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tuning": "full"}, r"needs encoder\.tuning=frozen, got full"),
        ({"tuning": "lora"}, r"needs encoder\.tuning=frozen, got lora"),
        ({"pretrained": None}, r"needs a tower with weights, got encoder\.pretrained=null"),
        ({"keys": {STATE: "state", "action": "action"}}, "needs a camera among data.keys"),
        ({"keys": KEYS | {TOP: "tip"}}, "the key of .* must be one of .* Did you mean 'top'"),
        ({"keys": KEYS | {TOP: "state"}}, r"data\.keys\.observation\.images\.top: state holds no pictures"),
        ({"keys": KEYS | {TOP: "top[0]"}}, "is an image; dimensions cannot be chosen"),
    ],
)
def test_config_that_cannot_be_embedded_is_named(store, weights, choices, message):
    with pytest.raises(ValueError, match=message):
        embed_quietly(store, config_for(weights, **choices))
    assert not (store / GROUP).exists()


def test_other_encoders_and_wrong_choices_are_named(store, weights):
    config = config_for(weights)
    plain = config_from_dict(config.to_dict() | {"encoder": {"name": "resnet"}})
    with pytest.raises(ValueError, match=r"data embed needs encoder\.name=clip, got resnet"):
        embed_quietly(store, plain)
    with pytest.raises(ValueError, match=r"--dtype must be one of .*, got 'float61'. Did you mean 'float16'"):
        embed_quietly(store, config, dtype="float61")
    with pytest.raises(ValueError, match="--batch must be at least 1"):
        embed_quietly(store, config, batch_size=0)


def test_disk_without_room_is_noticed_before_anything_is_written(store, weights, monkeypatch):
    full = type("usage", (), {"free": 10})
    monkeypatch.setattr("diffpolicy.embed.shutil.disk_usage", lambda path: full)
    before = list_files(store)
    with pytest.raises(ValueError, match=r"on a disk with 0\.0 GB free"):
        embed_quietly(store, config_for(weights))
    assert list_files(store) == before


def test_numbers_beyond_float16_are_refused(store, weights, monkeypatch):
    from diffpolicy.encoders.clip import ClipEncoder

    look = ClipEncoder.look
    monkeypatch.setattr(ClipEncoder, "look", lambda self, *args: (look(self, *args)[0] * 1e6, None))
    with pytest.raises(ValueError, match="pooled of top has numbers that float16 cannot hold; use --dtype float32"):
        embed_quietly(store, config_for(weights), dtype="float16")
    assert not (store / GROUP).exists()


# --- whole or not at all ---


def test_error_in_the_middle_leaves_the_store_as_it_was(store, weights, monkeypatch):
    config = config_for(weights, store)
    embed_quietly(store, config)
    before = {name: (store / name).read_bytes() for name in list_files(store)}
    from diffpolicy.encoders.clip import ClipEncoder

    look, calls = ClipEncoder.look, []

    def fail_at_third(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return look(self, *args)

    monkeypatch.setattr(ClipEncoder, "look", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        embed_quietly(store, config, batch_size=8)
    assert {name: (store / name).read_bytes() for name in list_files(store)} == before


def test_killed_process_leaves_the_store_as_it_was_and_the_next_clears_up(store, weights):
    config = config_for(weights, store)
    embed_quietly(store, config)
    before = embedded_windows(config, ReplayBuffer.open(store))[TOP]["pooled"]
    code = f"""
import os, signal
import numpy as np
from diffpolicy.embedding_store import write_embedding
from diffpolicy.replay import ReplayBuffer
def rows(key):
    yield {{"pooled": np.zeros(({FRAMES} if key == "top" else 3, 64), np.float32)}}
    if key == "wrist":
        os.kill(os.getpid(), signal.SIGKILL)
with ReplayBuffer.open({str(store)!r}, "a") as buffer:
    write_embedding(buffer, {{}}, {{"pooled": (64,)}}, "float32", ["top", "wrist"], rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list(store.glob(f".{GROUP}.new-*"))) == 1
    np.testing.assert_array_equal(embedded_windows(config, ReplayBuffer.open(store))[TOP]["pooled"], before)
    assert [f for f in validate(store) if f.level == "error"] == []
    embed_quietly(store, config)
    assert list(store.glob(f".{GROUP}.*")) == []
    np.testing.assert_array_equal(embedded_windows(config, ReplayBuffer.open(store))[TOP]["pooled"], before)


def test_recipe_names_model_weights_crop_and_versions(store, weights):
    config = config_for(weights, store, crop_ratio=0.8)
    embed_quietly(store, config)
    recipe = open_embedding(store).recipe
    assert recipe["model"] == "diffpolicy-tiny" and recipe["pretrained"].endswith("clip_5.pt")
    assert recipe["open_clip"] == open_clip.__version__
    assert recipe["crop"] == {"where": "centre", "crop_ratio": 0.8, "square_crop": False}
    assert recipe["image_size"] == 64 and recipe["preprocess"]["interpolation"] == "bicubic"
    torch.manual_seed(5)
    assert recipe["weights_sha256"] == hash_of_weights(open_clip.create_model("diffpolicy-tiny").visual)


def test_size_is_said_before_anything_is_written(store, weights):
    said = io.StringIO()
    console = Console(file=said, width=200)
    done = embed(store, config_for(weights, image="patch_tokens"), device="cpu", console=console)
    assert done.shapes == {"pooled": (64,), "patches": (64, 64)}
    assert f"{FRAMES} frames of 2 cameras: pooled 64 and patches 64x64 in float32, 0.9 MB" in said.getvalue()


# --- the command ---


def test_command_embeds_with_the_files_that_train_gets(store, weights, tmp_path):
    (tmp_path / "conf.yaml").write_text(
        "data: {keys: {observation.images.top: top, action: action}}\n"
        f"encoder: {{name: clip, pretrained: {weights / 'clip_5.pt'}, crop_ratio: null}}\n"
    )
    arguments = ["embed", store, tmp_path / "conf.yaml", "encoder.tuning=frozen", "--device", "cpu", "--batch", "8"]
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0
    assert f"has features of {FRAMES} frames of top; train with data.embedded=true" in result.output
    with pytest.raises(ValueError, match="no config: give the YAML files"):
        CliRunner().invoke(app, ["embed", str(store), "encoder.tuning=frozen"], catch_exceptions=False)
