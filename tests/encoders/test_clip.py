"""The CLIP encoder: what goes into the condition, which parameters learn, and what it refuses."""

import copy

import pytest
import torch
from torchvision.transforms.v2 import functional as vision

from diffpolicy.encoders.clip import ClipConfig, ClipEncoder
from diffpolicy.spec import DataSpec, FieldSpec

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
WORDS = ["push the red block", "push the blue block"]
EMBED_DIM, NUM_PATCHES = 64, 64


def make_spec(*, state=3, **cameras):
    fields = {
        f"observation.images.{name}": FieldSpec(shape=(*size, 3), dtype="uint8") for name, size in cameras.items()
    }
    if state:
        fields[STATE] = FieldSpec(shape=(state,), dtype="float32")
    fields["action"] = FieldSpec(shape=(2,), dtype="float32")
    return DataSpec(fields=fields)


GOAL = DataSpec(fields={**make_spec(top=(48, 48)).fields, "goal.image": FieldSpec(shape=(48, 48, 3), dtype="uint8")})
ONE, TWO, NO_CAMERA = make_spec(top=(48, 48)), make_spec(top=(48, 48), wrist=(40, 56)), make_spec()


def build(spec=ONE, obs_horizon=2, **choices):
    torch.manual_seed(0)
    return ClipEncoder(ClipConfig(**{"token_dim": 16} | choices), spec=spec, obs_horizon=obs_horizon).eval()


def observation(spec=ONE, batch=3, obs_horizon=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    obs = {"task": [WORDS[i % 2] for i in range(batch)]}
    for key in spec.image_keys:
        shape = (batch, obs_horizon, *spec.fields[key].shape)
        obs[key] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for key in spec.goal_keys:
        obs[key] = torch.randint(0, 256, (batch, 1, *spec.fields[key].shape), dtype=torch.uint8, generator=generator)
    for key in spec.state_keys:
        obs[key] = torch.randn(batch, obs_horizon, *spec.fields[key].shape, generator=generator)
    return obs


def count_calls(tower):
    calls = []
    tower.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


# --- the condition ---


@pytest.mark.parametrize(
    ("spec", "choices", "global_dim", "groups"),
    [
        (ONE, {"text": "none"}, 2 * (3 + 64), [("state", 1, 0), ("state", 1, 1), ("image", 1, 0), ("image", 1, 1)]),
        (NO_CAMERA, {}, 2 * 3 + 64, [("state", 1, 0), ("state", 1, 1), ("text", 1, None)]),
        (make_spec(state=0, top=(48, 48)), {"text": "none"}, 2 * 64, [("image", 1, 0), ("image", 1, 1)]),
        (
            TWO,
            {"image": "patch_tokens"},
            2 * (3 + 2 * 64) + 64,
            [("state", 1, 0), ("state", 1, 1), *[("image", 64, 0)] * 2, *[("image", 64, 1)] * 2, ("text", 1, None)],
        ),
        (
            GOAL,
            {},
            2 * (3 + 64) + 64 + 64,
            [("state", 1, 0), ("state", 1, 1), ("image", 1, 0), ("image", 1, 1), ("goal", 1, None), ("text", 1, None)],
        ),
    ],
)
def test_sizes_follow_from_cameras_states_goal_and_words(spec, choices, global_dim, groups):
    encoder = build(spec, **choices)
    assert encoder.cond.global_dim == global_dim and encoder.cond.token_dim == 16
    assert [(g.kind, g.count, g.frame) for g in encoder.cond.groups] == groups
    condition = encoder(observation(spec))
    num_tokens = sum(count for _, count, _ in groups)
    assert condition.global_cond.shape == (3, global_dim) and condition.tokens.shape == (3, num_tokens, 16)
    assert condition.token_mask is None


def test_global_vector_is_state_and_images_of_each_frame_and_then_the_words():
    encoder, obs = build(TWO), observation(TWO)
    pictures = encoder.embed_images(obs, [TOP, WRIST])
    words = encoder.embed_tasks(obs, batch_size=3, like=torch.zeros(1)).vector[:, 0]
    frames = encoder(obs).global_cond[:, :-EMBED_DIM].unflatten(1, (2, -1))  # (B, T_obs, 3 + 2 * 64)
    torch.testing.assert_close(frames[..., :3], obs[STATE])
    torch.testing.assert_close(frames[..., 3:], torch.cat([pictures[TOP].vector, pictures[WRIST].vector], dim=-1))
    torch.testing.assert_close(encoder(obs).global_cond[:, -EMBED_DIM:], words)
    only_wrist = build(make_spec(wrist=(40, 56)))
    only_wrist.image_tower.load_state_dict(encoder.image_tower.state_dict())
    seen = only_wrist.embed_images(obs, [WRIST])[WRIST].vector
    torch.testing.assert_close(seen, pictures[WRIST].vector)  # one tower for all cameras


def test_keypoints_stand_in_the_vector_and_in_the_one_token_of_a_picture():
    encoder, obs = build(TWO, image="keypoints", num_keypoints=5), observation(TWO)
    assert encoder.cond.global_dim == 2 * (3 + 2 * (64 + 10)) + 64
    assert encoder.cond.kinds == ("state",) * 2 + ("image",) * 4 + ("text",)
    found = encoder.embed_images(obs, [TOP])[TOP]
    assert torch.equal(found.tokens, found.vector.unsqueeze(2)) and found.vector.shape == (3, 2, 74)
    plain = build(TWO)
    plain.image_tower.load_state_dict(encoder.image_tower.state_dict())
    torch.testing.assert_close(found.vector[..., :64], plain.embed_images(obs, [TOP])[TOP].vector)
    assert found.vector[..., 64:].abs().max() <= 1


def test_all_cameras_and_frames_pass_the_tower_at_once():
    encoder = build(TWO)
    calls = count_calls(encoder.image_tower)
    encoder(observation(TWO))
    assert calls == [2 * 3 * 2]


def test_patch_tokens_stand_frame_by_frame_and_camera_by_camera():
    encoder, obs = build(TWO, image="patch_tokens"), observation(TWO)
    before = encoder(obs)
    obs[WRIST][0, 1] = 255 - obs[WRIST][0, 1]  # camera 1, frame 1, sample 0
    changed = (encoder(obs).tokens != before.tokens).any(dim=-1)
    want = torch.zeros(3, 2 + 4 * NUM_PATCHES + 1, dtype=torch.bool)
    want[0, 2 + 3 * NUM_PATCHES : 2 + 4 * NUM_PATCHES] = True
    assert torch.equal(changed, want)


def test_patches_know_their_camera():
    encoder = build(make_spec(top=(48, 48), wrist=(48, 48)), image="patch_tokens")
    obs = observation(encoder.spec)
    obs[WRIST] = obs[TOP]
    top, wrist = encoder(obs).tokens[:, 2 : 2 + 2 * NUM_PATCHES].split(NUM_PATCHES, dim=1)
    assert not torch.allclose(top, wrist)


# --- pictures ---


@pytest.mark.parametrize("size", [(90, 120), (50, 40)])
def test_camera_is_resized_like_torchvision_with_antialiasing(size):
    encoder = build(make_spec(top=size), crop_ratio=None)
    coarse = torch.randint(30, 226, (4, 3, 9, 12), generator=torch.Generator().manual_seed(0)).float()
    frames = (
        vision.resize(coarse, list(size)).round().to(torch.uint8)
    )  # soft, as on noise uint8 clips between its two passes
    seen = encoder.pixels({TOP: frames.permute(0, 2, 3, 1).unflatten(0, (2, 2))}, TOP)
    mean, std = (torch.tensor(encoder.architecture["preprocess"][k]).view(3, 1, 1) for k in ("mean", "std"))
    resize = {"size": [64, 64], "interpolation": vision.InterpolationMode.BICUBIC, "antialias": True}
    assert (
        (seen * std + mean) * 255 - vision.resize(frames, **resize)
    ).abs().max() < 1.01  # uint8 counts in steps of one
    exact = vision.resize(frames.float(), **resize).clamp(0, 255).round()
    torch.testing.assert_close(seen, (exact / 255 - mean) / std)


def test_constants_are_open_clips():
    black = build(crop_ratio=None).pixels({TOP: torch.zeros(1, 2, 48, 48, 3, dtype=torch.uint8)}, TOP)
    torch.testing.assert_close(black[0, :, 0, 0], torch.tensor([-1.7923, -1.7521, -1.4802]), atol=1e-4, rtol=0)


def rows_seen(encoder, height=80, batch=16):
    """(first, last) row of the frame that each of the (batch, 2) pictures shows; rows are one grey level apart."""
    frames = torch.arange(height, dtype=torch.uint8)[:, None, None].expand(batch, 2, height, height, 3)
    mean, std = (torch.tensor(encoder.architecture["preprocess"][k]).view(3, 1, 1) for k in ("mean", "std"))
    grey = (encoder.pixels({TOP: frames}, TOP) * std + mean) * 255
    return grey[:, 0, [0, -1], 0].round().unflatten(0, (batch, 2))


def test_evaluation_sees_the_centre_and_training_another_place_for_each_sample_but_not_for_each_frame():
    encoder = build(make_spec(top=(80, 80)), crop_ratio=0.8)
    assert (rows_seen(encoder) == torch.tensor([8.0, 71.0])).all()  # 64 of 80, not resized
    encoder.train()
    torch.manual_seed(0)
    rows = rows_seen(encoder)
    assert (rows[:, 0] == rows[:, 1]).all() and rows[:, 0, 0].unique().numel() > 6
    assert (rows[..., 1] - rows[..., 0] == 63).all()


def test_crop_keeps_the_shape_of_the_frame_or_is_square():
    wide = make_spec(top=(60, 100))
    assert build(wide, crop_ratio=0.9).crop_sizes == {TOP: (54, 90)}
    assert build(wide, crop_ratio=0.9, square_crop=True).crop_sizes == {TOP: (54, 54)}
    assert build(wide, crop_ratio=None, square_crop=True).crop_sizes == {TOP: (60, 60)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({TOP: torch.zeros(3, 2, 48, 48, 3)}, f"{TOP} must be uint8 in 0..255 .*, got torch.float32"),
        ({TOP: torch.zeros(3, 2, 3, 48, 48, dtype=torch.uint8)}, rf"{TOP} must be \(B, T_obs=2, 48, 48, 3\), got"),
    ],
)
def test_wrong_image_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        build()(observation() | wrong)


# --- words ---


def test_frozen_words_are_embedded_once_until_the_weights_change():
    with pytest.warns(UserWarning, match="keeps random weights in text_tower"):
        encoder = build(NO_CAMERA, tuning="frozen").train()
    calls = count_calls(encoder.text_tower)
    for _ in range(3):
        first = encoder(observation(NO_CAMERA, batch=5)).global_cond
    assert calls == [1, 1]  # two instructions, one at a time
    with torch.no_grad():
        encoder.text_tower.text_projection.mul_(2)
    second = encoder(observation(NO_CAMERA, batch=5)).global_cond
    assert calls == [1, 1, 1, 1]
    torch.testing.assert_close(second[:, 6:], 2 * first[:, 6:])
    encoder.load_state_dict(build(NO_CAMERA).state_dict(), assign=True)
    torch.testing.assert_close(encoder(observation(NO_CAMERA, batch=5)).global_cond, first)


def test_words_that_are_learnt_are_embedded_once_a_batch_with_gradients():
    encoder = build(NO_CAMERA).train()
    calls = count_calls(encoder.text_tower)
    encoder(observation(NO_CAMERA, batch=7)).global_cond.sum().backward()
    assert calls == [2] and encoder.text_tower.token_embedding.weight.grad.any()


def test_words_that_were_learnt_are_remembered_when_nothing_learns():
    encoder = build(NO_CAMERA)
    calls = count_calls(encoder.text_tower)
    with torch.inference_mode():
        first = encoder(observation(NO_CAMERA)).global_cond
        again = encoder(observation(NO_CAMERA)).global_cond
    assert calls == [1, 1] and torch.equal(first, again)
    learnt = encoder(observation(NO_CAMERA)).global_cond  # with gradients
    torch.testing.assert_close(learnt, first.clone())


def test_words_remembered_in_inference_mode_serve_a_training_step():
    encoder = build(NO_CAMERA, text_tuning="frozen", architecture=build(NO_CAMERA).architecture).train()
    with torch.inference_mode():
        encoder(observation(NO_CAMERA))
    encoder(observation(NO_CAMERA)).tokens.sum().backward()
    assert encoder.assemble.projections["text"].weight.grad.any()


def test_remembered_words_do_not_depend_on_their_neighbours():
    encoder = build(NO_CAMERA)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        together = encoder(observation(NO_CAMERA)).global_cond[1:2]
        alone = other({key: value[1:2] for key, value in observation(NO_CAMERA).items()}).global_cond
    assert torch.equal(together, alone)


def test_prompt_surrounds_the_instruction():
    with torch.no_grad():
        asked = build(NO_CAMERA, prompt="a robot, told to {}")(observation(NO_CAMERA)).global_cond
        spelt = observation(NO_CAMERA)
        spelt["task"] = [f"a robot, told to {task}" for task in spelt["task"]]
        torch.testing.assert_close(build(NO_CAMERA)(spelt).global_cond, asked)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, "observation must have 'task', .*encoder.text=none"),
        (["push", " ", "push"], "task must hold an instruction for every observation, number 1 has ' '"),
        (["push", None, "push"], "number 1 has None"),
        (["push"], r"task must be a list of B=3 strings, got \['push'\]"),
        ("abc", r"task must be a list of B=3 strings, got 'abc'"),
        (
            ["push"] * 2 + ["very " * 31 + "slowly"],
            "must fit into 32 tokens, start and end included; this has 34: 'very very",
        ),
    ],
)
def test_instruction_that_cannot_be_read_is_named(task, message):
    obs = observation(NO_CAMERA)
    obs.pop("task")
    with pytest.raises(ValueError, match=message):
        build(NO_CAMERA)(obs if task is None else obs | {"task": task})


def test_longest_instruction_fits():
    build(NO_CAMERA)(observation(NO_CAMERA) | {"task": ["very " * 29 + "slowly"] * 3})


# --- tuning ---


def test_frozen_tower_stays_in_eval_mode_without_gradients_and_its_weights_do_not_learn():
    architecture = build().architecture
    encoder = build(tuning="frozen", architecture=architecture).train()
    towers = ("image_tower.", "text_tower.")
    assert all(p.requires_grad != name.startswith(towers) for name, p in encoder.named_parameters())
    assert not encoder.image_tower.training and not encoder.text_tower.transformer.resblocks[0].training
    assert encoder.training and encoder.assemble.training
    pictures = encoder.embed_images(observation(), [TOP])
    assert not pictures[TOP].vector.requires_grad and encoder.lr_scales() == {}


def test_last_blocks_learn_and_what_lies_before_them_does_not():
    encoder = build(
        tuning="last_n", num_tuned_blocks=1, text_tuning="frozen", architecture=build().architecture
    ).train()
    learns = {name for name, p in encoder.image_tower.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in learns} == {"transformer", "ln_post", "proj"}
    assert {name.split(".")[2] for name in learns if name.startswith("transformer")} == {"2"}
    blocks = encoder.image_tower.transformer.resblocks
    assert [block.training for block in blocks] == [False, False, True]
    assert not any(p.requires_grad for p in encoder.text_tower.parameters())
    encoder(observation()).global_cond.sum().backward()
    assert {name for name, p in encoder.image_tower.named_parameters() if p.grad is not None} == learns


def test_batch_norm_of_a_frozen_tower_keeps_its_statistics():
    architecture = copy.deepcopy(build(text="none").architecture)
    architecture["model"]["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    encoder = build(text="none", tuning="frozen", architecture=architecture).train()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    encoder(observation())
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())


@pytest.mark.parametrize(
    ("choices", "scale"),
    [
        ({}, 1.0),
        ({"pretrained": "tag"}, 0.1),
        ({"model": "hf-hub:a/b"}, 0.1),
        ({"pretrained": "tag", "lr_scale": 0.5}, 0.5),
    ],
)
def test_towers_that_begin_with_weights_learn_at_a_tenth_of_the_rate(choices, scale):
    encoder = build(architecture=build().architecture, **choices)  # the architecture keeps weights from being read
    scales = encoder.lr_scales()
    assert set(scales.values()) == {scale}
    assert {name.split(".")[0] for name in scales} == {"image_tower", "text_tower"}


# --- what is refused ---


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"image": "patches"}, r"encoder\.image must be one of .* Did you mean 'patch_tokens'"),
        ({"text": "words"}, r"encoder\.text must be one of \['none', 'pooled', 'tokens'\], got 'words'"),
        ({"tuning": "freeze"}, "Did you mean 'frozen'"),
        ({"text_tuning": "ful"}, r"encoder\.text_tuning must be one of .* Did you mean 'full'"),
        ({"prompt": "push it"}, r"encoder\.prompt must hold \{\} once"),
        ({"num_tuned_blocks": 0}, "num_tuned_blocks must be at least 1"),
        ({"crop_ratio": 1.5}, r"crop_ratio must be in \(0, 1\]"),
        ({"lr_scale": 0.0}, "lr_scale must be positive"),
    ],
)
def test_impossible_choice_is_named(choices, message):
    with pytest.raises(ValueError, match=message):
        ClipConfig(**choices)


@pytest.mark.parametrize(
    ("spec", "choices", "message"),
    [
        (NO_CAMERA, {"text": "none"}, r"use encoder\.name=state"),
        (NO_CAMERA, {"image": "patch_tokens"}, r"encoder\.image=patch_tokens needs a camera"),
        (make_spec(state=0), {}, "needs a camera or a state"),
        (DataSpec(fields={TOP: FieldSpec(shape=(48, 48, 1), dtype="uint8")}), {}, rf"{TOP} must be \(H, W, 3\)"),
    ],
)
def test_data_that_do_not_fit_are_named(spec, choices, message):
    with pytest.raises(ValueError, match=message):
        build(spec, **choices)
