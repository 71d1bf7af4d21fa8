"""Towers out of open_clip: the same numbers as open_clip's own, from every source, and what is refused."""

import json
import subprocess
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffpolicy.encoders import clip_towers
from diffpolicy.encoders.clip import ClipConfig, ClipEncoder
from diffpolicy.encoders.clip_towers import build_towers
from diffpolicy.encoders.clip_weights import PRESETS, known_models, look_up
from diffpolicy.spec import DataSpec, FieldSpec

TINY = "diffpolicy-tiny"
TOP = "observation.images.top"
SPEC = DataSpec(
    fields={
        TOP: FieldSpec(shape=(64, 64, 3), dtype="uint8"),
        "observation.state": FieldSpec(shape=(2,), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    }
)
INSTRUCTION = "push the red block to the left"


@pytest.fixture(scope="module")
def source():
    """A random CLIP of open_clip's own class, as somebody else would have trained and saved it."""
    known_models()
    torch.manual_seed(5)
    return open_clip.create_model(TINY).eval()


@pytest.fixture
def weights_file(source, tmp_path) -> Path:
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


def encoder_of(**choices):
    return ClipEncoder(ClipConfig(crop_ratio=None, **choices), spec=SPEC, obs_horizon=1).eval()


def observation():
    pixels = torch.randint(0, 256, (2, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {TOP: pixels, "observation.state": torch.zeros(2, 1, 2), "task": [INSTRUCTION, "stop"]}


@pytest.mark.parametrize("name", ["diffpolicy-tiny", "diffpolicy-small"])
def test_our_presets_are_models_of_open_clip_that_embed_pictures_and_words(name):
    assert name in known_models()
    towers = build_towers(name, None, need_image=True, need_text=True)
    side = towers.image.image_size[0]
    assert (
        towers.image(torch.zeros(1, 3, side, side)).shape
        == towers.text(torch.zeros(1, 32 if "tiny" in name else 64, dtype=int)).shape
    )


def test_presets_lie_inside_the_package_and_git_does_not_ignore_them():
    root = Path(clip_towers.__file__).parents[2]
    files = sorted(PRESETS.glob("*.json"))
    assert [f.stem for f in files] == ["diffpolicy-small", "diffpolicy-tiny"] and PRESETS.parent.name == "encoders"
    if (root / ".git").exists():
        done = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=root, capture_output=True, text=True)
        assert done.stdout == ""


def test_pooled_image_is_what_open_clip_makes_of_its_own_preprocessing(source, weights_file):
    obs, encoder = observation(), encoder_of(pretrained=str(weights_file), text="none")
    preprocess = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=64), is_train=False)
    pixels = torch.stack([preprocess(Image.fromarray(frame[0].numpy())) for frame in obs[TOP]])
    seen = encoder.embed_images(obs, [TOP])[TOP]
    torch.testing.assert_close(seen.vector[:, 0], source.encode_image(pixels), atol=1e-5, rtol=0)
    assert torch.equal(seen.tokens, seen.vector.unsqueeze(2))


def test_words_are_what_open_clip_makes_of_them(source, weights_file):
    encoder = encoder_of(pretrained=str(weights_file))
    want = source.encode_text(open_clip.get_tokenizer(TINY)([INSTRUCTION, "stop"]))
    got = encoder.embed_tasks(observation(), batch_size=2, like=torch.zeros(1))
    torch.testing.assert_close(got.vector[:, 0], want, atol=1e-5, rtol=0)


def test_patches_are_the_last_layer_behind_its_norm(source, weights_file):
    encoder = encoder_of(pretrained=str(weights_file), image="patch_tokens")
    patches = encoder.embed_images(observation(), [TOP])[TOP].tokens
    want = source.visual.forward_intermediates(
        encoder.pixels(observation(), TOP), indices=1, normalize_intermediates=True, output_fmt="NLC"
    )["image_intermediates"][0]
    assert patches.shape == (2, 1, 64, 64)
    torch.testing.assert_close(patches[:, 0], want, atol=1e-5, rtol=0)


def test_every_way_to_bring_weights_gives_the_same_bits(source, weights_file, tmp_path):
    state = source.state_dict()
    torch.save(state, tmp_path / "clip.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_3.pt")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(TINY)}))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    ways = [(TINY, str(tmp_path / name)) for name in ("clip.pt", "epoch_3.pt", "clip.safetensors")]
    for model, pretrained in [*ways, (f"local-dir:{folder}", None)]:
        condition = encoder_of(model=model, pretrained=pretrained).image_tower.state_dict()
        assert all(torch.equal(condition[key], value) for key, value in source.visual.state_dict().items()), pretrained


def test_preprocessing_of_a_folder_is_kept(source, tmp_path):
    described = {
        "model_cfg": open_clip.get_model_config(TINY),
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "model.safetensors")
    encoder = encoder_of(model=f"local-dir:{tmp_path}", text="none")
    assert encoder.architecture["preprocess"] == {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
    }
    black = encoder.pixels({TOP: torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8)}, TOP)
    torch.testing.assert_close(black[0, :, 0, 0], torch.tensor([-0.2, -0.4, -0.6]))


def test_constants_of_a_tag_are_known_without_its_weights():
    tag = look_up("ViT-B-16-SigLIP", "webli", image_size=None)
    assert tag["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    clip = look_up("ViT-B-32", "laion2b_s34b_b79k", image_size=None)
    assert clip["preprocess"]["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_position_embeddings_of_weights_are_interpolated_to_another_size(source, weights_file):
    encoder = encoder_of(pretrained=str(weights_file), image_size=96, image="patch_tokens", text="none")
    assert encoder.cond.num_tokens == 1 + (96 // 8) ** 2
    assert torch.equal(
        encoder.image_tower.positional_embedding[0], source.visual.positional_embedding[0]
    )  # the class token's
    assert encoder(observation()).tokens.shape == (2, 145, 128)


def test_architecture_rebuilds_the_towers_and_reads_no_weights(weights_file):
    first = encoder_of(pretrained=str(weights_file))
    weights_file.unlink()
    again = encoder_of(pretrained=str(weights_file), architecture=json.loads(json.dumps(first.architecture)))
    again.load_state_dict(first.state_dict())
    assert torch.equal(again(observation()).global_cond, first(observation()).global_cond)


def test_tower_that_nobody_needs_is_not_kept():
    towers = build_towers(TINY, None, need_image=True, need_text=False)
    assert towers.text is None and towers.image is not None
    assert build_towers(TINY, None, need_image=False, need_text=True).image is None
    names = {name.partition(".")[0] for name, _ in encoder_of(text="none").named_parameters()}
    assert names == {"image_tower", "assemble"}


def test_tower_of_another_kind_sees_pictures_but_has_no_patches():
    known_models()
    assert "RN50" in open_clip.list_models()
    with torch.device("meta"):
        resnet = build_towers("RN50", None, need_image=True, need_text=False).image
    with pytest.raises(
        ValueError, match=r"patch_tokens needs a ViT, .* 'RN50' is a ModifiedResNet .*encoder\.image=pooled"
    ):
        clip_towers.patch_grid(resnet, "RN50")
    with pytest.raises(ValueError, match="last_n needs a Transformer of open_clip, got ModifiedResNet"):
        clip_towers.freeze(resnet, "last_n", 1)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"model": "diffpolicy-tinny"},
            r"encoder\.model must be one of .* got 'diffpolicy-tinny'\. Did you mean 'diffpolicy-tiny'",
        ),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79"}, "Did you mean 'laion2b_s34b_b79k'"),
        (
            {"model": "ViT-B-32", "pretrained": "openai"},
            "trained with quick_gelu=True, .*set encoder.model=ViT-B-32-quickgelu",
        ),
        ({"model": "ViT-B-32-quickgelu", "pretrained": "laion2b_s34b_b79k"}, "encoder.pretrained must be a file"),
        ({"pretrained": "no.safetensors"}, r"must be a tag or an existing file, got 'no\.safetensors'"),
        (
            {"model": "local-dir:nowhere"},
            "must name a folder with open_clip_config.json; nowhere/open_clip_config.json is missing",
        ),
        (
            {"model": "local-dir:x", "pretrained": "y.pt"},
            "encoder.pretrained must be null for encoder.model='local-dir:x'",
        ),
        ({"model": "coca_ViT-B-32"}, "is no pair of an image and a text tower"),
        ({"model": "ViT-B-16-SigLIP"}, "needs a model with open_clip's own tokenizer, .*encoder.text=none"),
        (
            {"model": "ViT-B-16-SigLIP", "text": "none", "image_size": 64},
            "image_size must be null for 'ViT-B-16-SigLIP'",
        ),
        ({"tuning": "last_n", "num_tuned_blocks": 4}, r"num_tuned_blocks must be in \[1, 3\] for this tower, got 4"),
    ],
)
def test_impossible_model_is_named(choices, message):
    with pytest.raises(ValueError, match=message):
        encoder_of(**choices)


def test_file_of_other_weights_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt' does not hold weights that fit 'diffpolicy-tiny'"):
        encoder_of(pretrained=str(tmp_path / "other.pt"))


def test_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="does not hold weights that fit"):
        encoder_of(pretrained=str(tmp_path / "evil.pt"))


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(TINY)}))
    with pytest.raises(ValueError, match="does not hold weights that fit"):
        encoder_of(model=f"local-dir:{tmp_path}")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": 3}'])
def test_damaged_folder_is_named(tmp_path, text):
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"open_clip_config\.json (is not readable as JSON|must hold a section model_cfg)"
    ):
        encoder_of(model=f"local-dir:{tmp_path}")


def test_weights_that_cannot_be_fetched_say_how_to_bring_a_file(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", refuse)
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", refuse)
    for choices in ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}, {"model": "hf-hub:org/model"}):
        with pytest.raises(
            ValueError, match=r"could not be fetched: .*no route to host.* set encoder\.pretrained to a file"
        ):
            build_towers(choices["model"], choices.get("pretrained"), need_image=True, need_text=False)


def test_repository_of_the_hub_is_built_from_its_config_and_filled_with_its_weights(
    source, weights_file, tmp_path, monkeypatch
):
    config = tmp_path / "open_clip_config.json"
    config.write_text(
        json.dumps({"model_cfg": open_clip.get_model_config(TINY), "preprocess_cfg": {"mean": [0, 0, 0]}})
    )
    fetch = lambda model_id, filename=None, **rest: str(config if filename == "open_clip_config.json" else weights_file)
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", fetch)
    encoder = encoder_of(model="hf-hub:org/model")
    assert torch.equal(encoder.image_tower.conv1.weight, source.visual.conv1.weight)
    assert encoder.architecture["preprocess"]["mean"] == [0, 0, 0]
