import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from diffpolicy.encoders.resnet import CameraTower, ResnetConfig, ResnetEncoder, SpatialSoftmax, crop_frames
from diffpolicy.spec import ConditionSpec, DataSpec, FieldSpec, frame_tokens

TOP, WRIST = "observation.images.top", "observation.images.wrist"


def make_spec(**cameras):
    fields = {
        f"observation.images.{name}": FieldSpec(shape=(*size, 3), dtype="uint8") for name, size in cameras.items()
    }
    fields["observation.state"] = FieldSpec(shape=(2,), dtype="float32")
    fields["action"] = FieldSpec(shape=(2,), dtype="float32")
    return DataSpec(fields=fields)


def build(spec, obs_horizon=2, **choices):
    torch.manual_seed(0)
    config = ResnetConfig(**{"feature_dim": 8, "num_keypoints": 4} | choices)
    return ResnetEncoder(config, spec=spec, obs_horizon=obs_horizon)


def coordinates(batch, frames, height, width):
    """Images whose red is the row and green the column."""
    image = torch.zeros(batch, frames, height, width, 3, dtype=torch.uint8)
    image[..., 0] = torch.arange(height)[:, None]
    image[..., 1] = torch.arange(width)
    return image


def test_image_recipe_has_66_numbers_a_frame_and_the_parameters_of_the_reference():
    with torch.device("meta"):
        encoder = ResnetEncoder(ResnetConfig(), spec=make_spec(top=(96, 96)), obs_horizon=2)
    assert encoder.cond == ConditionSpec(global_dim=132, groups=frame_tokens(2), token_dim=66)
    # ResNet-18 without its classifier 11,176,512; 1x1 convolution 512 * 32 + 32; linear 64 * 64 + 64
    assert sum(p.numel() for p in encoder.parameters()) == 11_176_512 + 16_416 + 4_160
    assert encoder.crop_sizes == {TOP: (84, 84)}


def test_batch_norm_is_replaced_by_groups_of_sixteen_channels():
    with torch.device("meta"):
        tower = CameraTower(ResnetConfig())
    norms = [m for m in tower.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 20
    assert all(norm.num_channels == 16 * norm.num_groups for norm in norms)
    assert not [m for m in tower.modules() if isinstance(m, nn.BatchNorm2d)]


def test_spatial_softmax_of_a_bright_pixel_is_its_place():
    pool = SpatialSoftmax(1, 1)
    pool.conv.weight.data.fill_(1.0)
    pool.conv.bias.data.zero_()
    x = torch.zeros(2, 1, 3, 5)
    x[0, 0, 0, 4] = 1000.0  # first row, last column
    torch.testing.assert_close(pool(x), torch.tensor([[1.0, -1.0], [0.0, 0.0]]), atol=1e-6, rtol=0)


def test_spatial_softmax_gives_x_and_y_of_each_keypoint_in_turn():
    pool = SpatialSoftmax(2, 2)
    pool.conv.weight.data = torch.eye(2).view(2, 2, 1, 1)
    pool.conv.bias.data.zero_()
    x = torch.zeros(1, 2, 3, 3)
    x[0, 0, 0, 2] = x[0, 1, 2, 1] = 1000.0
    torch.testing.assert_close(pool(x), torch.tensor([[1.0, -1.0, 0.0, 1.0]]), atol=1e-6, rtol=0)


def test_random_crop_is_the_same_over_the_frames_of_a_sample_and_differs_between_samples():
    torch.manual_seed(0)
    cropped = crop_frames(coordinates(16, 3, 20, 30), (12, 10), random=True)
    assert cropped.shape == (16, 3, 12, 10, 3)
    corners = cropped[:, :, 0, 0, :2]  # (16, 3, 2): row and column
    assert (corners == corners[:, :1]).all()
    assert len({tuple(corner) for corner in corners[:, 0].tolist()}) > 8


def test_random_crop_cuts_a_window_of_neighbouring_pixels():
    torch.manual_seed(0)
    cropped = crop_frames(coordinates(4, 2, 20, 30), (12, 10), random=True).long()
    corner = cropped[:, :, :1, :1]
    assert (cropped[..., 0] - corner[..., 0] == torch.arange(12)[:, None]).all()
    assert (cropped[..., 1] - corner[..., 1] == torch.arange(10)).all()


def test_random_crop_reaches_every_place_including_the_last():
    torch.manual_seed(0)
    cropped = crop_frames(coordinates(200, 1, 5, 6), (3, 3), random=True)
    assert set(cropped[:, 0, 0, 0, 0].tolist()) == {0, 1, 2}
    assert set(cropped[:, 0, 0, 0, 1].tolist()) == {0, 1, 2, 3}


def test_random_crop_follows_the_global_generator():
    frames = coordinates(8, 1, 20, 20)
    torch.manual_seed(3)
    first = crop_frames(frames, (5, 5), random=True)
    torch.manual_seed(3)
    assert torch.equal(first, crop_frames(frames, (5, 5), random=True))


def test_eval_takes_the_centre():
    encoder = build(make_spec(top=(96, 96))).eval()
    pixels = encoder.pixels({TOP: coordinates(2, 2, 96, 96)}, TOP)
    assert pixels.shape == (4, 3, 84, 84)
    rows = ((pixels[:, 0] + 1) / 2 * 255).round()
    assert (rows[:, 0, 0] == 6).all() and (rows[:, -1, 0] == 89).all()


def test_training_crops_at_random():
    encoder = build(make_spec(top=(48, 48)))
    obs = {TOP: coordinates(4, 2, 48, 48)}
    torch.manual_seed(0)
    assert not torch.equal(encoder.pixels(obs, TOP), encoder.pixels(obs, TOP))


def test_pixels_are_scaled_to_minus_one_and_one():
    encoder = build(make_spec(top=(40, 40)), crop_ratio=None)
    obs = {TOP: torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(4800).view(1, 2, 40, 40, 3)}
    pixels = encoder.pixels(obs, TOP)
    assert (pixels[0] == -1).all() and (pixels[1] == 1).all()


def test_imagenet_statistics_centre_imagenets_mean():
    encoder = build(make_spec(top=(40, 40)), crop_ratio=None, pixel_stats="imagenet")
    colour = torch.tensor([124, 116, 104], dtype=torch.uint8)  # .485, .456, .406 of 255, rounded
    assert encoder.pixels({TOP: colour.expand(1, 2, 40, 40, 3)}, TOP).abs().max() < 0.01


def test_frames_are_resized_before_they_are_cropped():
    encoder = build(make_spec(top=(96, 128)), resize=(48, 64), crop_size=(40, 56)).eval()
    pixels = encoder.pixels({TOP: coordinates(1, 2, 96, 128)}, TOP)
    assert pixels.shape == (2, 3, 40, 56)
    row = (pixels[0, 0, :, 28] + 1) / 2 * 255
    torch.testing.assert_close(row, 2 * torch.arange(4, 44) + 0.5, atol=0.1, rtol=0)


def test_cameras_of_different_sizes_have_towers_of_their_own():
    encoder = build(make_spec(top=(48, 56), wrist=(56, 64))).eval()
    obs = {
        TOP: coordinates(3, 2, 48, 56),
        WRIST: coordinates(3, 2, 56, 64),
        "observation.state": torch.randn(3, 2, 2),
    }
    condition = encoder(obs)
    assert len(encoder.towers) == 2
    assert condition.tokens.shape == (3, 2, 8 + 8 + 2)
    torch.testing.assert_close(condition.tokens[..., 16:], obs["observation.state"])
    torch.testing.assert_close(condition.global_cond, condition.tokens.flatten(1))


def test_shared_tower_sees_the_same_in_every_camera():
    encoder = build(make_spec(top=(48, 48), wrist=(48, 48)), share_towers=True).eval()
    image = coordinates(2, 2, 48, 48)
    tokens = encoder({TOP: image, WRIST: image, "observation.state": torch.zeros(2, 2, 2)}).tokens
    assert len(encoder.towers) == 1
    torch.testing.assert_close(tokens[..., :8], tokens[..., 8:16])


def test_features_belong_to_the_frame_they_were_seen_in():
    encoder = build(make_spec(top=(48, 48))).eval()
    obs = {TOP: coordinates(2, 2, 48, 48), "observation.state": torch.zeros(2, 2, 2)}
    changed = obs | {TOP: obs[TOP].clone()}
    changed[TOP][1, 0] = 255 - changed[TOP][1, 0]
    differs = (encoder(obs).tokens != encoder(changed).tokens).any(dim=-1)
    assert differs.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 2, 40, 40, 3), f"{TOP} must be uint8 in 0..255 .*, got torch.float32"),
        (torch.zeros(1, 2, 3, 40, 40, dtype=torch.uint8), rf"{TOP} must be \(B, T_obs=2, 40, 40, 3\), got"),
    ],
)
def test_wrong_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        build(make_spec(top=(40, 40)))({TOP: image, "observation.state": torch.zeros(1, 2, 2)})


def test_missing_camera_is_named():
    with pytest.raises(ValueError, match=f"observation must have '{TOP}'"):
        build(make_spec(top=(40, 40)))({"observation.state": torch.zeros(1, 2, 2)})


def test_data_without_cameras_is_refused():
    with pytest.raises(ValueError, match=r"use encoder\.name=state"):
        build(make_spec())


def test_crop_larger_than_the_frame_is_refused():
    with pytest.raises(ValueError, match=rf"crop_size must fit into {TOP} of \(40, 40\) pixels, got \(41, 40\)"):
        build(make_spec(top=(40, 40)), crop_size=(41, 40))


def test_crop_that_leaves_the_spatial_softmax_one_row_is_refused():
    with pytest.raises(ValueError, match=rf"{TOP} must have more than 32 pixels a side .*, got \(32, 40\)"):
        build(make_spec(top=(40, 40)), crop_size=(32, 40))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_ratio": 1.2}, r"crop_ratio must be in \(0, 1\]"),
        ({"crop_size": (84,)}, r"crop_size must be \(height, width\)"),
        ({"pixel_stats": "imagnet"}, "Did you mean 'imagenet'"),
        ({"group_norm": False}, "got weights=null"),
        ({"feature_dim": 0}, "feature_dim must be at least 1"),
    ],
)
def test_impossible_choice_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ResnetConfig(**wrong)


def test_weights_from_a_file_fill_the_convolutions_and_norms_start_afresh(tmp_path):
    torch.manual_seed(1)
    source = resnet18(weights=None)
    nn.init.constant_(source.bn1.weight, 7.0)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    encoder = build(make_spec(top=(48, 48)), weights=str(tmp_path / "resnet18.pth"))
    backbone = encoder.towers[0].backbone
    assert torch.equal(backbone[0].weight, source.conv1.weight)
    assert torch.equal(backbone[5][0].downsample[0].weight, source.layer2[0].downsample[0].weight)
    assert (backbone[1].weight == 1).all()


def test_frozen_batch_norm_computes_what_the_source_computes(tmp_path):
    torch.manual_seed(1)
    source = resnet18(weights=None)
    nn.init.normal_(source.bn1.running_mean)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    encoder = build(make_spec(top=(48, 48)), weights=str(tmp_path / "resnet18.pth"), group_norm=False)
    x = torch.randn(2, 3, 32, 32)
    want = nn.Sequential(*list(source.eval().children())[:-2])(x)
    torch.testing.assert_close(encoder.train().towers[0].backbone(x), want, atol=1e-4, rtol=1e-4)


def test_imagenet_weights_come_through_torchvision(tmp_path, monkeypatch):
    torch.manual_seed(1)
    source = resnet18(weights=None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(source.state_dict(), cache / "resnet18-f37072fd.pth")  # where torchvision keeps what it has fetched
    encoder = build(make_spec(top=(48, 48)), weights="imagenet", pixel_stats="imagenet")
    assert torch.equal(encoder.towers[0].backbone[0].weight, source.conv1.weight)


def test_file_of_other_weights_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"does not hold a ResNet-18: no 'layer1\.0\.conv1\.weight'"):
        build(make_spec(top=(48, 48)), weights=str(tmp_path / "other.pth"))


def test_missing_file_of_weights_is_named():
    with pytest.raises(ValueError, match=r"encoder.weights must be null, 'imagenet' or an existing file, got 'no.pth'"):
        build(make_spec(top=(48, 48)), weights="no.pth")
