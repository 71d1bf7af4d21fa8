"""Checkpoints in the format of the Diffusion Policy code base, written here, read without running what is in them."""

import builtins
import os
import pickle
import zipfile

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from diffpolicy.denoisers import DENOISERS
from diffpolicy.denoisers.transformer import TransformerConfig
from diffpolicy.denoisers.unet import UnetConfig
from diffpolicy.encoders.resnet import ResnetConfig, ResnetEncoder
from diffpolicy.foreign import load_reference_checkpoint, reference_policy_parts
from diffpolicy.spec import Condition, ConditionSpec, DataSpec, FieldSpec, frame_tokens

POLICIES = "diffusion_policy.policy."
SCHEDULER = {
    "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
    "num_train_timesteps": 100,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
UNET = UnetConfig(down_dims=(16, 32), kernel_size=3, n_groups=4, diffusion_step_embed_dim=16)
TRANSFORMER = TransformerConfig(width=16, depth=2, num_heads=4, dropout=0.3)
STATE_COND = ConditionSpec(global_dim=10, groups=frame_tokens(2), token_dim=5)


def build(kind, config, cond=STATE_COND):
    torch.manual_seed(0)
    return DENOISERS[kind][1](config, action_dim=3, pred_horizon=8, cond=cond).eval()


def normalizer_state(**sizes):
    stats = ("scale", "offset", "input_stats.min", "input_stats.max", "input_stats.mean", "input_stats.std")
    return {
        f"normalizer.params_dict.{key}.{stat}": torch.full((size,), float(i))
        for key, size in sizes.items()
        for i, stat in enumerate(stats)
    }


def policy_state(denoiser, **sizes):
    state = {f"model.{key}": tensor for key, tensor in denoiser.state_dict().items()}
    empty = {"_dummy_variable": torch.empty(0), "mask_generator._dummy_variable": torch.empty(0)}
    return empty | state | normalizer_state(**(sizes or {"obs": 5, "action": 3}))


def unet_cfg(**policy):
    return {
        "training": {"use_ema": True, "device": "cuda:0", "max_train_steps": None},
        "policy": {
            "_target_": POLICIES + "diffusion_unet_lowdim_policy.DiffusionUnetLowdimPolicy",
            "model": {"n_groups": 4},
            "noise_scheduler": SCHEDULER,
            "horizon": 8,
            "obs_dim": 5,
            "n_action_steps": 4,
            "n_obs_steps": 2,
            "num_inference_steps": 100,
            "obs_as_local_cond": False,
            "obs_as_global_cond": True,
            "pred_action_steps_only": False,
            "oa_step_convention": True,
        }
        | policy,
    }


def transformer_cfg(**policy):
    cfg = unet_cfg(
        _target_=POLICIES + "diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy",
        model={"n_head": 4, "p_drop_attn": 0.3, "p_drop_emb": 0.0},
        obs_as_cond=True,
    )
    cfg["policy"] |= policy
    return cfg


def save(path, cfg, model, ema=None, /, **payload):
    """The payload of the authors' workspaces; their pickle module is dill, whose plain integers pickle alike."""
    state_dicts = {"model": model, "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": []}}
    if ema is not None:
        state_dicts["ema_model"] = ema
    content = {
        "cfg": OmegaConf.create(cfg),
        "state_dicts": state_dicts,
        "pickles": {"global_step": pickle.dumps(1234, 4), "epoch": pickle.dumps(56, 4), "_output_dir": b"not read"},
    }
    torch.save(content | payload, path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "latest.ckpt"


def test_checkpoint_is_read_as_plain_data(path):
    model = policy_state(build("unet", UNET))
    checkpoint = load_reference_checkpoint(save(path, unet_cfg(), model))
    assert checkpoint.cfg == unet_cfg()
    assert type(checkpoint.cfg["policy"]) is dict
    assert (checkpoint.global_step, checkpoint.epoch) == (1234, 56)
    assert checkpoint.state_dicts.keys() == {"model"}
    torch.testing.assert_close(checkpoint.state_dicts["model"], model, rtol=0, atol=0)


def test_lists_and_scalars_of_the_cfg_keep_their_types(path):
    cfg = {"betas": [0.95, 0.999], "flag": True, "none": None, "count": 3, "nested": [{"a": "b"}, [1, 2]]}
    checkpoint = load_reference_checkpoint(save(path, cfg, {"x": torch.zeros(1)}))
    assert checkpoint.cfg == cfg
    assert type(checkpoint.cfg["betas"]) is list and type(checkpoint.cfg["flag"]) is bool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_every_type_come_back(path, dtype):
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    views = {"all": tensor, "part": tensor[1:, 1:], "turned": tensor.T, "none": tensor[:0], "scalar": tensor[1, 2]}
    got = load_reference_checkpoint(save(path, {}, views)).state_dicts["model"]
    torch.testing.assert_close(got, views, rtol=0, atol=0)


def test_type_as_dill_writes_it_becomes_its_name(path):
    def text(word):
        return b"X" + len(word).to_bytes(4, "little") + word.encode()

    # {"cfg": {"a": dill._dill._load_type("DictType")}, "state_dicts": {"model": {}}}, as opcodes
    data = b"\x80\x02}(" + text("cfg") + b"}" + text("a")
    data += b"cdill._dill\n_load_type\n" + text("DictType") + b"\x85Rs"
    data += text("state_dicts") + b"}" + text("model") + b"}su."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("latest/data.pkl", data)
    assert load_reference_checkpoint(path).cfg == {"a": "DictType"}


class Hostile:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch {}", "(posix|nt).system"),
        (builtins.eval, "open({!r}, 'w')", "builtins.eval"),
        (builtins.exec, "open({!r}, 'w')", "builtins.exec"),
        (getattr, "{}", "builtins.getattr"),
        (OmegaConf.load, "{}", "(builtins.getattr|omegaconf.omegaconf)"),
        (torch.load, "{}", "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("place", ["cfg", "optimizer", "pickles"])
def test_global_that_is_not_plain_data_is_refused_and_not_run(tmp_path, path, function, argument, name, place):
    trace = tmp_path / "it_ran"
    hostile = Hostile(function, argument.format(str(trace)))
    cfg, model = unet_cfg(), {"x": torch.zeros(1)}
    if place == "cfg":
        save(path, cfg, model, cfg={"policy": hostile})
    elif place == "optimizer":
        save(path, cfg, model, state_dicts={"model": model, "optimizer": hostile})
    else:
        save(path, cfg, model, pickles={"epoch": pickle.dumps(hostile)})
    with pytest.raises(ValueError, match=f"latest.ckpt cannot be read .* it asks for {name}.*refused"):
        load_reference_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_file_cut_short_is_a_value_error(path, kept):
    save(path, unet_cfg(), policy_state(build("unet", UNET)))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match="cut short" if kept else "not a zip archive"):
        load_reference_checkpoint(path)


def test_flipped_bit_in_the_weights_is_found(path):
    save(path, {}, {"x": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="CRC"):
        load_reference_checkpoint(path)


def test_tensor_that_reaches_beyond_its_storage_is_refused(path):
    tensor = torch.arange(4.0)
    save(path, {}, {"x": tensor})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    key = next(name for name in members if name.endswith("data/0") or name.endswith("data/1"))
    members[key] = members[key][:8]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"must have \d stored numbers, got 2"):
        load_reference_checkpoint(path)


def test_old_format_of_torch_is_refused_with_the_way_out(path):
    torch.save({"cfg": {}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"not a zip archive of torch\.save; save a file of torch before 1\.6 again"):
        load_reference_checkpoint(path)


def test_missing_file_is_named(path):
    with pytest.raises(ValueError, match=f"there is no checkpoint at {path}"):
        load_reference_checkpoint(path)


def test_other_payload_is_named(path):
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"must have `cfg` and `state_dicts`, got \['weights'\]"):
        load_reference_checkpoint(path)


def parts_of(path, cfg, model, ema=None):
    return reference_policy_parts(load_reference_checkpoint(save(path, cfg, model, ema)))


@pytest.mark.parametrize(
    ("kind", "config", "cfg"), [("unet", UNET, unet_cfg()), ("transformer", TRANSFORMER, transformer_cfg())]
)
def test_imported_denoiser_computes_what_the_saved_one_computes(path, kind, config, cfg):
    saved = build(kind, config)
    parts = parts_of(path, cfg, policy_state(saved))
    assert (parts.kind, parts.denoiser_config) == (kind, config)
    assert (parts.action_dim, parts.pred_horizon, parts.obs_horizon, parts.act_horizon, parts.past) == (3, 8, 2, 4, 1)
    assert parts.state_shapes == {"obs": (5,)} and parts.image_shapes == {} and parts.encoder == "state"
    imported = DENOISERS[parts.kind][1](parts.denoiser_config, action_dim=3, pred_horizon=8, cond=STATE_COND).eval()
    imported.load_state_dict(parts.denoiser_state, strict=True)
    tokens, t = torch.randn(4, 2, 5), torch.tensor([0.0, 1.0, 50.0, 99.0])
    x_t, condition = torch.randn(4, 8, 3), Condition(tokens.flatten(1), tokens)
    assert torch.equal(imported(x_t, t, condition), saved(x_t, t, condition))


def test_process_and_normaliser_come_along(path):
    parts = parts_of(path, unet_cfg(), policy_state(build("unet", UNET)))
    assert (parts.num_train_timesteps, parts.num_inference_steps) == (100, 100)
    assert (parts.beta_schedule, parts.prediction_type) == ("squaredcos_cap_v2", "epsilon")
    assert parts.noise_scheduler["clip_sample"] is True
    assert parts.normalizer.keys() == {"obs", "action"}
    action = parts.normalizer["action"]
    assert action.scale.tolist() == [0.0] * 3 and action.offset.tolist() == [1.0] * 3
    assert {name: stat[0].item() for name, stat in action.stats.items()} == {"min": 2, "max": 3, "mean": 4, "std": 5}


def test_moving_average_is_taken_where_there_is_one(path):
    live, average = build("unet", UNET), build("unet", UNET)
    nn.init.constant_(average.final_conv[1].bias, 5.0)
    parts = parts_of(path, unet_cfg(), policy_state(live), policy_state(average))
    assert parts.ema and (parts.denoiser_state["final_conv.1.bias"] == 5).all()
    cfg = unet_cfg() | {"training": {"use_ema": False}}
    parts = parts_of(path, cfg, policy_state(live), policy_state(average))
    assert not parts.ema and (parts.denoiser_state["final_conv.1.bias"] != 5).all()


def test_policy_that_predicts_executed_steps_only_has_no_past(path):
    parts = parts_of(path, unet_cfg(pred_action_steps_only=True), policy_state(build("unet", UNET)))
    assert (parts.pred_horizon, parts.past) == (4, 0)


def test_old_step_convention_executes_from_the_step_after_the_last_observed(path):
    parts = parts_of(path, unet_cfg(oa_step_convention=False), policy_state(build("unet", UNET)))
    assert parts.past == 2


def image_cfg():
    shape_meta = {
        "action": {"shape": [3]},
        "obs": {"image": {"shape": [3, 48, 56], "type": "rgb"}, "agent_pos": {"shape": [2], "type": "low_dim"}},
    }
    cfg = unet_cfg(
        _target_=POLICIES + "diffusion_unet_hybrid_image_policy.DiffusionUnetHybridImagePolicy",
        shape_meta=shape_meta,
        n_groups=4,
        crop_shape=[40, 50],
        obs_encoder_group_norm=True,
        eval_fixed_crop=True,
    )
    del cfg["policy"]["model"], cfg["policy"]["obs_dim"], cfg["policy"]["oa_step_convention"]
    return cfg


def image_checkpoint():
    """An image policy's encoder, denoiser, and its state dict under the names of robomimic's image encoder."""
    fields = {
        "observation.images.image": FieldSpec(shape=(48, 56, 3), dtype="uint8"),
        "observation.state": FieldSpec(shape=(2,), dtype="float32"),
        "action": FieldSpec(shape=(3,), dtype="float32"),
    }
    torch.manual_seed(0)
    config = ResnetConfig(crop_size=(40, 50), crop_ratio=None, feature_dim=8, num_keypoints=4)
    encoder = ResnetEncoder(config, spec=DataSpec(fields=fields), obs_horizon=2).eval()
    denoiser = build("unet", UNET, encoder.cond)
    prefix = "obs_encoder.obs_nets.image."
    state = policy_state(denoiser, agent_pos=2, action=3)
    tower = encoder.towers[0]
    for key, tensor in tower.backbone.state_dict().items():
        state[f"{prefix}nets.0.nets.{key}"] = state[f"{prefix}backbone.nets.{key}"] = tensor
    for key, tensor in tower.pool.conv.state_dict().items():
        state[f"{prefix}nets.1.nets.{key}"] = state[f"{prefix}pool.nets.{key}"] = tensor
    for key, tensor in {"temperature": torch.ones(1), "pos_x": torch.zeros(1, 4), "pos_y": torch.zeros(1, 4)}.items():
        state[f"{prefix}nets.1.{key}"] = state[f"{prefix}pool.{key}"] = tensor
    for key, tensor in tower.linear.state_dict().items():
        state[f"{prefix}nets.3.{key}"] = tensor
    state["normalizer.params_dict.image.scale"] = torch.tensor([2.0])
    state["normalizer.params_dict.image.offset"] = torch.tensor([-1.0])
    return encoder, state


def test_imported_image_encoder_computes_what_the_saved_one_computes(path):
    encoder, state = image_checkpoint()
    parts = parts_of(path, image_cfg(), state)
    assert (parts.kind, parts.encoder, parts.encoder_config) == ("unet", "resnet", encoder.config)
    assert parts.image_shapes == {"image": (48, 56, 3)} and parts.state_shapes == {"agent_pos": (2,)}
    assert parts.normalizer.keys() == {"agent_pos", "action"}
    imported = ResnetEncoder(parts.encoder_config, spec=encoder.spec, obs_horizon=2).eval()
    imported.load_state_dict(parts.encoder_state, strict=True)
    obs = {
        "observation.images.image": torch.randint(0, 256, (2, 2, 48, 56, 3), dtype=torch.uint8),
        "observation.state": torch.randn(2, 2, 2),
    }
    assert torch.equal(imported(obs).global_cond, encoder(obs).global_cond)


def test_image_scaling_of_another_kind_is_refused(path):
    _, state = image_checkpoint()
    state["normalizer.params_dict.image.scale"] = torch.tensor([1.0])
    with pytest.raises(ValueError, match=r"normaliser of image must map \[0, 1\] to \[-1, 1\]"):
        parts_of(path, image_cfg(), state)


@pytest.mark.parametrize("key", ["model.extra.weight", "language.weight", "normalizer.params_dict.obs.extra"])
def test_key_without_a_place_is_named(path, key):
    state = policy_state(build("unet", UNET)) | {key: torch.zeros(1)}
    if key.startswith("model."):  # the denoiser's own strict loading names it
        parts = parts_of(path, unet_cfg(), state)
        with pytest.raises(RuntimeError, match=r"extra\.weight"):
            build("unet", parts.denoiser_config).load_state_dict(parts.denoiser_state, strict=True)
        return
    with pytest.raises(ValueError, match=r"language\.weight|obs must have scale and offset, got extra"):
        parts_of(path, unet_cfg(), state)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_target_": POLICIES + "ibc.IbcDfoLowdimPolicy"}, "got 'IbcDfoLowdimPolicy'"),
        ({"obs_as_global_cond": False}, r"policy\.obs_as_global_cond must be True .* got False"),
        ({"horizon": "${horizon}"}, r"cfg\.policy\.horizon must be resolved, got '\$\{horizon\}'"),
        ({"noise_scheduler": {"num_train_timesteps": 100}}, r"must have policy\.noise_scheduler\.beta_schedule"),
    ],
)
def test_policy_that_we_do_not_have_is_named(path, changed, message):
    with pytest.raises(ValueError, match=message):
        parts_of(path, unet_cfg(**changed), policy_state(build("unet", UNET)))
