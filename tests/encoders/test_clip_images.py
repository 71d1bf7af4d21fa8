"""What the CLIP encoder makes of its cameras: tokens of every kind, own towers, adapters, blocks that are run again."""

import warnings

import open_clip
import pytest
import torch

from diffpolicy.checkpoint import load_policy, save_policy
from diffpolicy.encoders import clip_towers, clip_weights
from diffpolicy.encoders.clip import ClipConfig, ClipEncoder
from diffpolicy.encoders.clip_weights import known_models
from diffpolicy.spec import GOAL_IMAGE, DataSpec, FieldSpec
from diffpolicy.training import parameter_groups
from tests.conftest import tiny_config_for

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
NUM_PATCHES, WIDTH, DEPTH, K = 64, 64, 3, 5
"""Of diffpolicy-tiny, and the resamplers' tokens here."""


def make_spec(*pictures):
    fields = {key: FieldSpec(shape=(48, 48, 3), dtype="uint8") for key in pictures}
    fields[STATE] = FieldSpec(shape=(3,), dtype="float32")
    return DataSpec(fields=fields | {"action": FieldSpec(shape=(2,), dtype="float32")})


ONE, TWO, WITH_GOAL = make_spec(TOP), make_spec(TOP, WRIST), make_spec(TOP, GOAL_IMAGE)


def build(spec=ONE, **choices):
    torch.manual_seed(0)
    choices = {"token_dim": 16, "crop_ratio": None, "text": "none"} | choices
    return ClipEncoder(ClipConfig(**choices), spec=spec, obs_horizon=2).eval()


def observation(spec=ONE, batch=3):
    generator = torch.Generator().manual_seed(1)
    obs = {STATE: torch.randn(batch, 2, 3, generator=generator), "task": ["push", "stop", "push"][:batch]}
    for key in (*spec.image_keys, *spec.goal_keys):
        shape = (batch, 1 if key == GOAL_IMAGE else 2, 48, 48, 3)
        obs[key] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return obs


# --- tokens of the pictures ---


@pytest.mark.parametrize(
    ("choices", "tokens"),
    [
        ({"image": "pooled"}, 1),
        ({"image": "patch_tokens"}, NUM_PATCHES),
        ({"image": "all_layers"}, NUM_PATCHES),
        ({"image": "all_layers", "image_layers": (0, -1)}, NUM_PATCHES),
        ({"image": "attention_pool", "num_image_tokens": K}, K),
        ({"image": "perceiver", "num_image_tokens": K, "resampler_depth": 3}, K),
        ({"image": "perceiver", "num_image_tokens": K, "image_layers": (0, 1)}, K),
    ],
)
def test_every_frame_of_every_camera_and_of_the_goal_has_as_many_tokens(choices, tokens):
    spec = make_spec(TOP, WRIST, GOAL_IMAGE)
    encoder = build(spec, **choices)
    condition = encoder(observation(spec))
    assert [group.count for group in encoder.cond.groups if group.kind == "image"] == [tokens] * 2 * 2
    assert [group.count for group in encoder.cond.groups if group.kind == "goal"] == [tokens]
    assert condition.tokens.shape == (3, encoder.cond.num_tokens, 16)
    assert condition.global_cond.shape == (3, encoder.cond.global_dim)


def test_all_layers_hand_on_what_every_layer_says_of_a_patch():
    encoder = build(image="all_layers")
    found = encoder.embed_images(observation(), [TOP])[TOP]
    assert found.tokens.shape == (3, 2, NUM_PATCHES, DEPTH * WIDTH)
    last = build(image="patch_tokens").embed_images(observation(), [TOP])[TOP]
    torch.testing.assert_close(found.tokens[..., -WIDTH:], last.tokens)
    torch.testing.assert_close(found.vector, last.vector)
    chosen = build(image="all_layers", image_layers=(-1, 0)).embed_images(observation(), [TOP])[TOP]
    torch.testing.assert_close(chosen.tokens, torch.cat([found.tokens[..., -WIDTH:], found.tokens[..., :WIDTH]], -1))


@pytest.mark.parametrize("image", ["attention_pool", "perceiver"])
def test_resampled_tokens_belong_to_their_own_frame_and_camera(image):
    encoder, obs = build(TWO, image=image, num_image_tokens=K), observation(TWO)
    before = encoder(obs).tokens
    obs[WRIST][0, 1] = 255 - obs[WRIST][0, 1]  # sample 0, frame 1, camera 1
    changed = (encoder(obs).tokens != before).any(dim=-1)
    groups = encoder.cond.groups
    first = sum(group.count for group in groups[:-1])
    assert groups[-1].kind == "image" and groups[-1].frame == 1
    assert changed[0, first:].all() and changed.sum() == K


@pytest.mark.parametrize("image", ["attention_pool", "perceiver"])
def test_resampler_learns_although_the_tower_is_frozen(image):
    encoder = build(image=image, tuning="frozen", architecture=build().architecture).train()
    encoder(observation()).tokens.square().sum().backward()
    assert all(p.grad is not None for p in encoder.resampler.parameters())
    assert all(p.grad is None for p in encoder.image_tower.parameters())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"image": "all_layers", "image_layers": (3,)}, r"image_layers must be in \[-3, 2\] for this tower, got 3"),
        ({"image": "all_layers", "image_layers": ()}, "image_layers must name at least one"),
        ({"image": "perceiver", "num_image_tokens": 0}, "num_image_tokens must be at least 1"),
        ({"image": "perciever"}, "Did you mean 'perceiver'"),
        ({"tuning": "lora", "lora_rank": 0}, "lora_rank must be at least 1"),
        ({"tuning": "lora", "lora_alpha": 0.0}, "lora_alpha must be positive"),
        ({"tuning": "lora", "lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"text_too_long": "cut"}, r"text_too_long must be one of \['error', 'truncate'\]"),
    ],
)
def test_impossible_choice_is_named(choices, message):
    with pytest.raises(ValueError, match=message):
        build(**choices)


def test_tower_without_patches_cannot_be_resampled():
    architecture = build().architecture
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    architecture = architecture | {"model": architecture["model"] | {"vision_cfg": vision}}
    for image in ("patch_tokens", "all_layers", "attention_pool", "perceiver"):
        with pytest.raises(ValueError, match=rf"encoder\.image={image} needs a ViT, .*encoder\.image=pooled"):
            build(image=image, architecture=architecture)
    with pytest.raises(ValueError, match=r"gradient_checkpointing needs a Transformer .*, got ModifiedResNet"):
        build(gradient_checkpointing=True, architecture=architecture)
    with pytest.raises(ValueError, match="tuning=lora needs a Transformer"):
        build(tuning="lora", architecture=architecture)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"image_layers": (0,)}, r"encoder\.image_layers=\(0,\) is ignored with encoder\.image=pooled"),
        ({"num_image_tokens": 3}, r"encoder\.num_image_tokens=3 is ignored with encoder\.image=pooled"),
        (
            {"image": "attention_pool", "resampler_depth": 3},
            "resampler_depth=3 is ignored with encoder.image=attention",
        ),
        ({"num_tuned_blocks": 1}, r"num_tuned_blocks=1 is ignored with encoder\.tuning=full"),
        ({"lora_rank": 4}, r"lora_rank=4 is ignored with encoder\.tuning=full"),
        ({"text_too_long": "truncate"}, r"text_too_long=truncate is ignored with encoder\.text=none"),
        ({"share_towers": False}, r"share_towers=false is ignored: there is one picture at most"),
        ({"tuning": "frozen", "gradient_checkpointing": True}, "gradient_checkpointing=True is ignored with .*frozen"),
    ],
)
def test_setting_that_nothing_looks_at_is_said(choices, message):
    with pytest.warns(UserWarning, match=message):
        build(**choices)


def test_defaults_and_loaded_policies_are_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        architecture = build(TWO, text="pooled").architecture
        build(num_image_tokens=3, tuning="frozen", architecture=architecture)


# --- a tower for each camera ---


def test_own_towers_begin_alike_and_learn_apart():
    spec = make_spec(TOP, WRIST, GOAL_IMAGE)
    encoder = build(spec, share_towers=False)
    names = {name.split(".")[1] for name in encoder.state_dict() if name.startswith("image_towers.")}
    assert names == {"top", "wrist", "goal/image"}
    assert not any(name.startswith("image_tower.") for name in encoder.state_dict())
    top, wrist = encoder.image_towers["top"], encoder.image_towers["wrist"]
    for (name, p), q in zip(top.named_parameters(), wrist.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q, name
    torch.testing.assert_close(encoder(observation(spec)).tokens, build(spec)(observation(spec)).tokens)
    found = encoder.embed_images(observation(spec), [TOP, WRIST])
    found[TOP].vector.sum().backward()
    assert top.conv1.weight.grad is not None and wrist.conv1.weight.grad is None


def test_frozen_towers_are_shared_as_they_would_stay_alike():
    with pytest.warns(UserWarning, match="share_towers=false is ignored: a frozen tower stays the same for all"):
        encoder = build(TWO, share_towers=False, tuning="frozen", text_tuning="full")
    assert encoder.image_tower is not None and len(encoder.image_towers) == 0


def test_own_towers_that_are_tuned_in_part_keep_the_rest_in_eval_mode():
    encoder = build(TWO, share_towers=False, tuning="last_n", num_tuned_blocks=1, architecture=build().architecture)
    encoder.train()
    for tower in encoder.image_towers.values():
        assert [block.training for block in tower.transformer.resblocks] == [False, False, True]
    assert {name.split(".")[1] for name in encoder.lr_scales()} == {"top", "wrist"}


# --- blocks that are run again ---


def gradients(**choices):
    encoder = build(image="patch_tokens", text="pooled", **choices).train()
    calls = [0]
    for tower in encoder.towers().values():
        for block in tower.transformer.resblocks:
            block.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    encoder(observation()).tokens.square().sum().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}, calls[0]


@pytest.mark.parametrize("choices", [{}, {"tuning": "lora", "lora_dropout": 0.3}])
def test_checkpointing_gives_the_same_gradients_and_runs_every_block_twice(choices):
    if choices:
        pytest.importorskip("peft")
    choices = choices | {"architecture": build(text="pooled").architecture}
    kept, calls = gradients(**choices)
    rerun, calls_of_rerun = gradients(gradient_checkpointing=True, **choices)
    assert calls == DEPTH + 2 and calls_of_rerun == 2 * calls  # three blocks see pictures, two read
    assert kept.keys() == rerun.keys()
    for name, grad in kept.items():
        torch.testing.assert_close(rerun[name], grad, atol=1e-6 * (1 + grad.abs().max().item()), rtol=0)


def test_tower_of_timm_is_checkpointed_adapted_and_resampled():
    pytest.importorskip("peft")
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    architecture = build().architecture
    architecture = architecture | {"model": architecture["model"] | {"vision_cfg": vision}}
    encoder = build(
        image="perceiver",
        num_image_tokens=K,
        image_layers=(2, -1),
        tuning="lora",
        gradient_checkpointing=True,
        architecture=architecture,
    ).train()
    condition = encoder(observation())
    assert condition.tokens.shape == (3, 2 + 2 * K, 16)
    condition.tokens.square().sum().backward()
    assert all(p.grad is not None for name, p in encoder.image_tower.named_parameters() if "lora_" in name)


# --- adapters ---


def test_lora_begins_as_the_base_and_only_adapters_of_the_towers_learn():
    pytest.importorskip("peft")
    architecture = build(text="pooled").architecture
    base = build(text="pooled", tuning="frozen", architecture=architecture)
    encoder = build(text="pooled", tuning="lora", architecture=architecture)
    towers = ("image_tower.", "text_tower.")
    encoder.load_state_dict({k: v for k, v in base.state_dict().items() if not k.startswith(towers)}, strict=False)
    torch.testing.assert_close(encoder(observation()).global_cond, base(observation()).global_cond)
    learns = {name for name, p in encoder.named_parameters() if p.requires_grad and name.startswith(towers)}
    assert learns and all(".lora_" in name for name in learns)
    assert {name.split(".")[0] for name in learns} == {"image_tower", "text_tower"}


def test_adapters_learn_at_the_policys_rate_though_the_tower_began_with_weights():
    pytest.importorskip("peft")
    architecture = build().architecture
    scales = build(tuning="lora", pretrained="tag", architecture=architecture).lr_scales()
    assert scales and set(scales.values()) == {1.0}
    chosen = build(tuning="lora", pretrained="tag", lr_scale=0.3, architecture=architecture).lr_scales()
    assert set(chosen.values()) == {0.3}


def test_optimizer_holds_adapters_and_none_of_the_frozen_weights(make_policy):
    pytest.importorskip("peft")
    policy = make_policy(
        spec=ONE,
        encoder={"name": "clip", "text": "none", "tuning": "lora", "architecture": build().architecture},
    )
    groups = parameter_groups(policy, 1e-2, lr=1e-3)
    held = {id(p) for group in groups for p in group["params"]}
    for name, p in policy.encoder.image_tower.named_parameters():
        assert (id(p) in held) == (".lora_" in name), name


def test_random_tower_under_adapters_is_said():
    pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="keeps random weights in image_tower"):
        build(tuning="lora")


def test_truncated_instruction_is_said_by_the_encoder():
    encoder = build(text="tokens", text_too_long="truncate")
    with pytest.warns(UserWarning, match="text_too_long=truncate"):
        condition = encoder(observation() | {"task": ["very " * 40 + "slowly"] * 3})
    assert condition.token_mask.all()


# --- saved and loaded ---


@pytest.mark.parametrize(
    "choices",
    [
        {"tuning": "lora", "lora_targets": ["in_proj", "c_fc"], "text": "tokens"},
        {"share_towers": False, "image": "perceiver", "image_layers": [0, -1], "num_image_tokens": K},
        {"image": "all_layers", "gradient_checkpointing": True, "image_size": 72},
    ],
)
def test_checkpoint_holds_all_that_loading_needs(make_policy, tmp_path, monkeypatch, choices):
    if choices.get("tuning") == "lora":
        pytest.importorskip("peft")
    known_models()
    torch.manual_seed(5)
    torch.save(open_clip.create_model("diffpolicy-tiny").state_dict(), tmp_path / "clip.pt")
    encoder = {"name": "clip", "pretrained": str(tmp_path / "clip.pt"), "token_dim": 16} | choices
    policy = make_policy(spec=TWO, encoder=encoder)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:  # as after some training
            torch.nn.init.normal_(parameter, std=0.05)
    config = tiny_config_for(encoder=encoder)
    folder = save_policy(policy, config, tmp_path / "checkpoint")
    (tmp_path / "clip.pt").unlink()
    monkeypatch.setattr(clip_weights, "load_model", None)
    monkeypatch.setattr(clip_towers, "load_model", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_policy(folder)
    obs = observation(TWO)
    want, got = (p.eval().encode(obs) for p in (policy, again))
    torch.testing.assert_close(got.tokens, want.tokens, atol=0, rtol=0)
    torch.testing.assert_close(got.global_cond, want.global_cond, atol=0, rtol=0)
