"""Validation: each kind of damage is found and named, and no damage makes it raise."""

import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

from diffpolicy.replay import ReplayBuffer
from diffpolicy.rewriting import convert
from diffpolicy.spec import FieldSpec
from diffpolicy.validation import Finding, validate
from tests.test_replay import real

METADATA = {"zarr.json", ".zgroup", ".zarray", ".zattrs"}
LENGTHS = (9, 12, 7, 15)
ENDS = (9, 21, 28, 43)


def numbers() -> dict[str, np.ndarray]:
    """43 steps in which nothing is wrong."""
    rng = np.random.default_rng(0)
    return {
        "img": rng.integers(1, 256, (43, 40, 40, 3)).astype(np.uint8),
        "state": rng.normal(size=(43, 3)).astype(np.float32),
        "action": rng.normal(size=(43, 2)).astype(np.float32),
    }


def make_v2(path: Path, ends=ENDS, **changes: np.ndarray | None) -> Path:
    """A classic store with Blosc, no compression, and chunks that also split columns."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    chunks = {"img": (10, 40, 20, 3), "state": (8, 2), "action": (16, 2)}
    for key, values in (numbers() | changes).items():
        if values is not None:
            compressors = None if key == "state" else "auto"
            root.create_array(f"data/{key}", data=values, chunks=chunks.get(key, "auto"), compressors=compressors)
    if ends is not None:
        root.create_array("meta/episode_ends", data=np.asarray(ends, np.int64), chunks=(208,))
    return path


def make_v3(path: Path) -> Path:
    data = numbers()
    fields = {key: FieldSpec(shape=values.shape[1:], dtype=values.dtype.name) for key, values in data.items()}
    with ReplayBuffer.create(path, fields=fields, fps=10) as buffer:
        start = 0
        for length in LENGTHS:
            episode = {key: values[start : start + length] for key, values in data.items()}
            buffer.append_episode(episode, task="push the T")
            start += length
    return path


def the_one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize("make", [make_v2, make_v3])
def test_a_sound_store_has_no_findings(tmp_path, make):
    assert validate(make(tmp_path / "a.zarr")) == []


@pytest.mark.parametrize("name", ["pusht_cchi_v7_replay.zarr", "pusht_keypoint_x356_y356.zarr"])
def test_real_pusht_is_sound(name):
    assert validate(real(name)) == []


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_numbers_that_are_not_finite_are_found_with_episode_row_and_count(tmp_path, value, what):
    action = numbers()["action"]
    action[[23, 25], 1] = value  # episode 2 begins at row 21
    finding = the_one(validate(make_v2(tmp_path / "a.zarr", action=action)))
    assert (finding.level, finding.key, finding.episode, finding.row) == ("error", "action", 2, 23)
    assert f"2 rows with {what} numbers in action" in finding.message
    assert "step 2 of episode 2" in finding.message and "--episodes 2" in finding.message


def test_nan_in_many_episodes_is_listed_once_each_and_then_counted(tmp_path):
    action = np.full((43, 2), np.nan, np.float32)
    action[::2] = np.arange(44).reshape(22, 2)
    findings = validate(make_v2(tmp_path / "a.zarr", ends=range(1, 44), action=action))
    assert [finding.episode for finding in findings[:10]] == list(range(1, 20, 2))
    assert "and 11 more episodes: 21 episodes with NaN rows in all" in findings[10].message
    assert len(findings) == 11


def test_black_frames_are_a_warning_with_their_rows_even_where_chunks_split_the_picture(tmp_path):
    img = numbers()["img"]
    img[[30, 31]] = 0
    img[5, :, :20] = 0  # half a picture is not black
    finding = the_one(validate(make_v2(tmp_path / "a.zarr", img=img)))
    assert (finding.level, finding.key, finding.episode, finding.row) == ("warning", "img", 3, 30)
    assert "2 black frames" in finding.message


def test_dimensions_that_never_change_are_a_warning(tmp_path):
    state = numbers()["state"]
    state[:, 1] = 0.25
    finding = the_one(validate(make_v2(tmp_path / "a.zarr", state=state)))
    assert (finding.level, finding.key) == ("warning", "state")
    assert "1 of 3 dimensions are the same in the whole set: [1] = 0.25" in finding.message


def test_a_jump_in_time_is_a_warning_but_a_new_episode_is_none(tmp_path):
    timestamp = np.concatenate([100 * i + 0.1 * np.arange(n) for i, n in enumerate(LENGTHS)])
    timestamp[14:21] += 0.5  # in episode 1
    finding = the_one(validate(make_v2(tmp_path / "a.zarr", timestamp=timestamp)))
    assert (finding.level, finding.key, finding.episode, finding.row) == ("warning", "timestamp", 1, 14)
    assert "0.600 s at row 14; a step takes 0.100 s" in finding.message


@pytest.mark.parametrize("num_rows", [40, 50])
def test_a_key_that_is_shorter_or_longer_than_the_episodes_is_an_error(tmp_path, num_rows):
    action = np.random.default_rng(0).normal(size=(num_rows, 2))
    finding = the_one(validate(make_v2(tmp_path / "a.zarr", action=action)))
    assert (finding.level, finding.key) == ("error", "action")
    assert f"action has {num_rows} rows, but episode_ends says 43" in finding.message


@pytest.mark.parametrize(
    ("ends", "message", "episode"),
    [
        ([9, 21, 21, 43], "episode 2 has no steps", 2),
        ([0, 21, 43], "episode 0 has no steps", 0),
        ([9, 28, 21, 43], "episode 2 ends before it begins", 2),
        ([], "no finished episodes", None),
        (None, "episode_ends is missing", None),
    ],
)
def test_episode_ends_that_make_no_sense_are_an_error(tmp_path, ends, message, episode):
    errors = [f for f in validate(make_v2(tmp_path / "a.zarr", ends=ends)) if f.file == "meta/episode_ends"]
    assert the_one(errors).level == "error"
    assert message in errors[0].message and errors[0].episode == episode


def test_a_store_without_action_is_an_error_unless_a_key_has_that_role(tmp_path):
    finding = the_one(validate(make_v2(tmp_path / "a.zarr", action=None)))
    assert "there must be a key 'action' or one with that role, got ['img', 'state']" in finding.message
    fields = {"command": FieldSpec(shape=(2,), dtype="float32")}
    with ReplayBuffer.create(tmp_path / "b.zarr", fields=fields, fps=10, roles={"command": "action"}) as buffer:
        buffer.append_episode({"command": numbers()["action"]})
    assert validate(tmp_path / "b.zarr") == []


@pytest.mark.parametrize(
    ("make", "file", "key", "rows"),
    [(make_v2, "data/action/1.0", "action", "16..31"), (make_v3, "data/img/c/0/0/0/0", "img", "0..42")],
)
def test_a_missing_chunk_file_is_named_with_the_rows_it_held(tmp_path, make, file, key, rows):
    path = make(tmp_path / "a.zarr")
    (path / file).unlink()
    assert len(zarr.open_group(path, mode="r")[f"data/{key}"][:]) == 43  # zarr does not mind
    finding = the_one(validate(path))
    assert (finding.level, finding.file, finding.key) == ("error", file, key)
    assert f"the file is missing; zarr reads rows {rows} of data/{key} as 0" in finding.message


def test_a_chunk_of_zeros_that_a_writer_left_out_is_told_how_to_be_made_whole(tmp_path):
    action = numbers()["action"]
    action[16:32] = 0  # zarr-python 3 writes no file for it
    finding = the_one(validate(make_v2(tmp_path / "a.zarr", action=action)))
    assert finding.file == "data/action/1.0" and "diffpolicy data convert" in finding.message
    convert(tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert validate(tmp_path / "b.zarr") == []
    np.testing.assert_array_equal(ReplayBuffer.open(tmp_path / "b.zarr").read("action"), action)


@pytest.mark.parametrize(
    ("make", "file"),
    [(make_v2, "data/action/1.0"), (make_v2, "data/state/1.0"), (make_v3, "data/img/c/0/0/0/0")],
    ids=["blosc", "uncompressed", "shard"],
)
def test_a_truncated_chunk_file_is_named(tmp_path, make, file):
    path = make(tmp_path / "a.zarr")
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) * 2 // 3])
    finding = the_one(validate(path))
    assert (finding.level, finding.file) == ("error", file) and "cannot be decoded" in finding.message


def test_every_flipped_bit_in_a_chunk_of_ours_is_found(tmp_path):
    path = make_v3(tmp_path / "a.zarr")
    for file in ("data/action/c/0/0", "data/img/c/0/0/0/0", "meta/episode_ends/c/0"):
        content = (path / file).read_bytes()
        for place in np.linspace(0, len(content) - 1, 12).astype(int):
            damaged = bytearray(content)
            damaged[place] ^= 16
            (path / file).write_bytes(damaged)
            assert any(f.level == "error" and f.file.startswith(file.split("/c/")[0]) for f in validate(path)), place
        (path / file).write_bytes(content)


@pytest.mark.parametrize(
    "file", ["data/action/zarr.json", "meta/episode_ends/zarr.json", "data/zarr.json", "zarr.json"]
)
def test_metadata_that_is_lost_or_broken_is_an_error(tmp_path, file):
    path = make_v3(tmp_path / "a.zarr")
    for content in (None, b"", b"{", b"[]", b'{"zarr_format": 3, "node_type": "array"}'):
        (path / file).unlink()
        if content is not None:
            (path / file).write_bytes(content)
        findings = validate(path)
        assert findings and findings[0].level == "error"
        (path / file).write_bytes(b"")


def test_what_a_killed_writer_left_is_a_warning(tmp_path):
    path = make_v3(tmp_path / "a.zarr")
    zarr.open_group(path, mode="r+")["data/action"].resize((60, 2))
    (path / "data/action/c/0/0.0123.partial").write_bytes(b"half")
    findings = validate(path)
    assert {finding.level for finding in findings} == {"warning"}
    assert any("17 rows of action belong to an unfinished episode" in finding.message for finding in findings)
    assert any(finding.file.endswith(".partial") for finding in findings)


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_what_is_not_a_store_is_one_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"PK")
    assert the_one(validate(tmp_path / name)).level == "error"


def test_a_zip_is_validated_too(tmp_path):
    shutil.make_archive(str(tmp_path / "a"), "zip", make_v2(tmp_path / "a.zarr"))
    assert validate(tmp_path / "a.zip") == []
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[500:40_000] = bytes(39_500)
    (tmp_path / "a.zip").write_bytes(content)
    assert any(finding.level == "error" for finding in validate(tmp_path / "a.zip"))


@pytest.mark.parametrize("make", [make_v2, make_v3])
def test_random_damage_never_raises_and_lost_or_cut_chunks_are_always_found(tmp_path, make):
    sound = make(tmp_path / "sound.zarr")
    files = sorted(p.relative_to(sound) for p in sound.rglob("*") if p.is_file())
    for seed in range(40):
        rng = random.Random(seed)
        path = tmp_path / "damaged.zarr"
        shutil.copytree(sound, path)
        victim = path / rng.choice(files)
        content = bytearray(victim.read_bytes())
        how = rng.choice(["flip", "cut", "delete"])
        if how == "delete":
            victim.unlink()
        elif how == "cut":
            victim.write_bytes(content[: rng.randrange(len(content))])
        else:
            for _ in range(rng.choice([1, 4, 30])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            victim.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy and zarr about what the damage looks like
            findings = validate(path)
        assert not any("the check itself failed" in finding.message for finding in findings), (seed, victim, findings)
        if how != "flip" and victim.name not in METADATA:
            assert any(finding.level == "error" for finding in findings), (seed, how, victim)
        shutil.rmtree(path)
