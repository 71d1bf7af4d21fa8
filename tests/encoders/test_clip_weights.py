"""What is known of a file of weights before it is read: its activation, how its pictures were prepared, whether it runs code."""

import json
import logging
import warnings

import open_clip
import pytest
import torch
from torch.nn import functional as F

from diffpolicy.encoders import clip_weights
from diffpolicy.encoders.clip_towers import build_towers, embed_image
from diffpolicy.encoders.clip_weights import check_pretrained, known_models, look_up, open_clip_tags, twin_of

B32 = "ViT-B-32"
HASHED = "vit_b_32-quickgelu-laion400m_e32-46683a32.pt"


def knowledge_of(file, model=B32):
    """What check_pretrained says of a file, with all warnings as errors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    known_models()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return check_pretrained(model, open_clip.get_model_config(model), str(file))


def test_every_model_named_quickgelu_has_its_twin():
    assert twin_of(B32) == f"{B32}-quickgelu" and twin_of(f"{B32}-quickgelu") == B32
    assert twin_of("ViT-B-16-SigLIP") == "" and twin_of("diffpolicy-tiny") == ""


def test_what_open_clip_says_of_its_tags_is_what_we_rely_on():
    tags = {(model, tag["hf_hub"]): tag["quick_gelu"] for model, tag in open_clip_tags() if tag.get("quick_gelu")}
    assert tags["ViT-B-32", "timm/vit_base_patch32_clip_224.openai/"] is True
    assert any(tag.get("url", "").endswith(HASHED) for _, tag in open_clip_tags())


def test_file_that_open_clip_published_under_its_name_needs_the_activation_it_was_trained_with(tmp_path):
    with pytest.raises(ValueError, match=rf"quick_gelu=True, as its name says: .*set encoder\.model={B32}-quickgelu"):
        knowledge_of(tmp_path / HASHED)
    assert knowledge_of(tmp_path / HASHED, f"{B32}-quickgelu")["quick_gelu"] is True
    with pytest.raises(ValueError, match=rf"quick_gelu=False, as its name says: .*set encoder\.model={B32}$"):
        knowledge_of(tmp_path / "vit_b_32-laion2b_e16-af8dbd0c.pth", f"{B32}-quickgelu")


def test_file_in_the_hubs_cache_is_known_by_its_repository(tmp_path):
    cache = tmp_path / "models--timm--vit_base_patch32_clip_224.openai" / "snapshots" / "3a4b"
    with pytest.raises(ValueError, match=rf"as models--timm--.* says.* set encoder\.model={B32}-quickgelu"):
        knowledge_of(cache / "open_clip_model.safetensors")
    siglip = tmp_path / "models--timm--ViT-B-16-SigLIP" / "blobs" / "model.safetensors"
    assert knowledge_of(siglip, "ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)


def test_config_beside_a_file_says_its_activation_and_its_preprocessing(tmp_path):
    described = {
        "model_cfg": open_clip.get_model_config(f"{B32}-quickgelu"),
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"quick_gelu=True, as .*open_clip_config\.json says"):
        knowledge_of(tmp_path / "mine.pt")
    assert knowledge_of(tmp_path / "mine.pt", f"{B32}-quickgelu") == described["preprocess_cfg"]


def test_preprocessing_beside_a_file_reaches_the_tower(tmp_path):
    known_models()
    described = {"model_cfg": open_clip.get_model_config("diffpolicy-tiny"), "preprocess_cfg": {"std": [1, 2, 3]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    (tmp_path / "clip.pt").touch()
    assert look_up("diffpolicy-tiny", str(tmp_path / "clip.pt"), image_size=None)["preprocess"]["std"] == [1, 2, 3]


def test_name_that_only_looks_like_openais_is_a_warning(tmp_path):
    with pytest.raises(UserWarning, match=rf"has the name of weights .*set encoder\.model={B32}-quickgelu"):
        knowledge_of(tmp_path / "ViT-B-32.pt")
    assert knowledge_of(tmp_path / "ViT-B-32.pt", f"{B32}-quickgelu")["quick_gelu"] is True


def test_file_of_unknown_origin_is_a_warning_where_the_model_comes_in_both_kinds(tmp_path):
    with pytest.raises(UserWarning, match=rf"nothing says whether .* set encoder\.model={B32}-quickgelu"):
        knowledge_of(tmp_path / "mine.pt")
    assert knowledge_of(tmp_path / "mine.pt", "diffpolicy-tiny") == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_archive_of_code_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(
        ValueError, match=r"is a TorchScript archive, which runs code .*pretrained=openai .* -quickgelu"
    ):
        check_pretrained(B32, open_clip.get_model_config(B32), str(tmp_path / "ViT-B-32.pt"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.pt")  # a zip too, but without code
    assert knowledge_of(tmp_path / "plain.pt", "diffpolicy-tiny") == {}


# --- other sizes of picture ---


@pytest.fixture(scope="module")
def smooth_weights(tmp_path_factory):
    """Weights whose positions change slowly over the picture, as trained ones do."""
    known_models()
    torch.manual_seed(0)
    clip = open_clip.create_model("diffpolicy-tiny")
    rows, columns = torch.meshgrid(torch.arange(8) / 8, torch.arange(8) / 8, indexing="ij")
    waves = torch.stack([rows, columns], dim=-1).flatten(0, 1) @ torch.randn(2, 64)  # (64, W)
    with torch.no_grad():
        clip.visual.positional_embedding[1:] = 0.3 * torch.sin(2 * waves)
    file = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip.state_dict(), file)
    return str(file)


def tower_for(file, size):
    towers = build_towers("diffpolicy-tiny", file, need_image=True, need_text=False, image_size=size)
    return towers.image.eval()


def grid(patches):
    side = round(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (side, side))  # (N, W, side, side)


def test_patches_of_a_picture_twice_as_large_are_those_of_the_small_one_in_between(smooth_weights):
    """Of one flat colour, so that patches differ by their place alone; averaging 2 x 2 of them gives the smaller grid."""
    colour = torch.randn(1, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, small = embed_image(tower_for(smooth_weights, 64), colour.expand(1, 3, 64, 64), patches=True)
        _, large = embed_image(tower_for(smooth_weights, 128), colour.expand(1, 3, 128, 128), patches=True)
    averaged = F.avg_pool2d(grid(large), 2)
    error = (averaged - grid(small)).square().mean().sqrt()
    spread = (grid(small) - grid(small).mean(dim=(2, 3), keepdim=True)).square().mean().sqrt()
    assert error < 0.1 * spread


@pytest.mark.parametrize("size", [56, 72, 104])
def test_grid_of_any_whole_number_of_patches_works(smooth_weights, size):
    tower = tower_for(smooth_weights, size)
    _, patches = embed_image(tower, torch.zeros(1, 3, size, size), patches=True)
    assert patches.shape == (1, (size // 8) ** 2, 64) and patches.isfinite().all()
    positions = tower.positional_embedding[1:]
    corner = tower_for(smooth_weights, 64).positional_embedding[1]
    assert (positions[0] - corner).norm() < 0.2 * (positions[-1] - corner).norm()


def test_size_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 8, .* got 70; take 72"):
        look_up("diffpolicy-tiny", None, image_size=70)


def test_retries_of_the_hub_are_not_printed_and_its_logger_is_left_as_it_was(caplog):
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    with caplog.at_level(logging.WARNING), clip_weights.only_our_line():
        logger.getChild("utils._http").warning("Retrying in 1s")
    assert caplog.text == "" and logger.level == before
    with pytest.raises(KeyError), clip_weights.only_our_line():
        raise KeyError
    assert logger.level == before
