"""Windows: which rows are seen, which are predicted, and what lies beyond the edge of an episode."""

import numpy as np
import pytest
import torch

from diffpolicy.replay import ReplayBuffer
from diffpolicy.spec import FieldSpec, Horizons
from diffpolicy.windows import WindowDataset, load_windows, read_role, split_episodes, window_indices

HORIZONS = Horizons(obs=2, pred=16, act=8)
PUSHT_KEYS = {"observation.environment_state": "keypoint", "observation.state": "state[0:2]", "action": "action"}


def rows_dataset(ends: list[int], horizons: Horizons) -> WindowDataset:
    """Observation and action of every row are the row's number, so that a batch says where it was taken from."""
    rows = torch.arange(ends[-1], dtype=torch.float32)[:, None]
    return WindowDataset(
        {"observation.state": rows, "action": rows}, window_indices(np.array(ends), horizons), horizons
    )


def test_real_episodes_give_the_published_number_of_windows(pusht_demos):
    ends = pusht_demos.episode_ends
    assert len(window_indices(ends, HORIZONS)) == 24_208
    train, _ = split_episodes(len(ends), val_ratio=0.02, max_train=90, seed=42)
    assert len(train) == 90
    assert len(window_indices(ends, HORIZONS, episodes=train)) == 10_726


def test_seed_42_holds_out_the_published_episodes():
    train, val = split_episodes(206, val_ratio=0.02, seed=42)
    assert val.tolist() == [18, 90, 134, 157]
    assert len(train) == 202


def test_split_is_of_whole_episodes_and_follows_the_seed():
    train, val = split_episodes(50, val_ratio=0.2, max_train=30, seed=1)
    assert len(train) == 30 and len(val) == 10 and not set(train) & set(val)
    again, _ = split_episodes(50, val_ratio=0.2, max_train=30, seed=1)
    other, _ = split_episodes(50, val_ratio=0.2, max_train=30, seed=2)
    assert train.tolist() == again.tolist() != other.tolist()


def test_split_always_leaves_an_episode_to_train_on():
    assert [x.tolist() for x in split_episodes(1, val_ratio=0.9)] == [[0], []]
    train, val = split_episodes(2, val_ratio=0.99)
    assert (len(train), len(val)) == (1, 1)
    assert len(split_episodes(10, val_ratio=0.0)[1]) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"val_ratio": 1.0}, r"data.val_ratio must be in \[0, 1\), got 1.0"),
        ({"val_ratio": -0.1}, r"data.val_ratio must be in \[0, 1\), got -0.1"),
        ({"max_train": 0}, "data.max_train_episodes must be at least 1, got 0"),
    ],
)
def test_split_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        split_episodes(10, **wrong)


def test_observations_and_actions_of_a_toy_episode_align_literally():
    horizons = Horizons(obs=2, pred=4, act=2)  # past = 1: the first predicted action is the one before now
    data = rows_dataset([6], horizons)
    batch = data.batch(torch.arange(len(data)))
    assert batch.obs["observation.state"][..., 0].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert batch.actions[..., 0].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 5]]
    assert batch.mask.tolist() == [
        [False, True, True, True],
        [True, True, True, True],
        [True, True, True, True],
        [True, True, True, True],
        [True, True, True, False],
    ]


def test_without_past_the_first_predicted_action_is_the_one_of_now():
    data = rows_dataset([10], Horizons(obs=2, pred=4, act=2, past=0))
    batch = data.batch(torch.tensor([3]))
    assert batch.obs["observation.state"][0, :, 0].tolist() == [2, 3]
    assert batch.actions[0, :, 0].tolist() == [3, 4, 5, 6]


def test_windows_pad_as_far_as_diffusion_policy_does():
    data = rows_dataset([40, 75], HORIZONS)
    mask = data.batch(torch.arange(len(data))).mask
    assert (~mask[:, 0]).sum() == 2 and mask[
        :, 1:9
    ].all()  # one padded step before, in the first window of each episode
    assert mask.sum(dim=1).min() == 16 - 7 and (mask.sum(dim=1) == 16 - 7).sum() == 2  # act - 1 steps behind its end


def test_episodes_never_mix():
    ends, data = [7, 9, 30], rows_dataset([7, 9, 30], HORIZONS)
    batch = data.batch(torch.arange(len(data)))
    episode_of_row = np.searchsorted(ends, np.arange(30), side="right")
    for values in (batch.obs["observation.state"], batch.actions):
        episodes = episode_of_row[values[..., 0].long().numpy()]
        np.testing.assert_array_equal(episodes, np.broadcast_to(data.indices.episode[:, None], episodes.shape))


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_short_episode_gives_one_window(length):
    data = rows_dataset([length], HORIZONS)
    assert len(data) == 1
    assert data.batch(torch.tensor([0])).mask.sum() == min(length, 15)


def test_more_padding_gives_a_window_for_every_step_and_never_more():
    assert len(window_indices(np.array([20]), HORIZONS, pad_after=14)) == 20
    assert len(window_indices(np.array([20]), HORIZONS, pad_after=99)) == 20


def test_windows_of_chosen_episodes_are_those_of_the_whole_set():
    ends = np.array([30, 50, 90])
    chosen, everything = window_indices(ends, HORIZONS, episodes=[2, 0]), window_indices(ends, HORIZONS)
    assert sorted(chosen.now) == sorted(everything.now[everything.episode != 1])
    assert set(zip(chosen.start, chosen.stop, strict=True)) == {(50, 90), (0, 30)}


class Counting(torch.Tensor):
    """Counts the rows that are gathered from it."""

    gathered = 0

    def __getitem__(self, rows):
        Counting.gathered += rows.numel()
        return self.as_subclass(torch.Tensor)[rows]


def test_only_observed_frames_are_gathered():
    frames = torch.zeros(40, 4, 4, 3, dtype=torch.uint8).as_subclass(Counting)
    indices = window_indices(np.array([40]), HORIZONS)
    data = WindowDataset({"observation.images.top": frames, "action": torch.zeros(40, 2)}, indices, HORIZONS)
    Counting.gathered = 0
    batch = data.batch(torch.arange(5))
    assert Counting.gathered == 5 * HORIZONS.obs
    assert batch.obs["observation.images.top"].shape == (5, 2, 4, 4, 3)
    assert batch.obs["observation.images.top"].dtype == torch.uint8


def test_window_is_described_by_episode_step_and_row():
    data = rows_dataset([20, 50], Horizons(obs=2, pred=4, act=2))
    window = int(np.nonzero(data.indices.now == 23)[0][0])
    assert data.describe(window) == "episode 1, step 3 (row 23)"


def test_real_observations_are_the_recorded_keypoints_and_pusher(pusht_demos):
    (data,), spec = load_windows(pusht_demos, PUSHT_KEYS, HORIZONS, [range(pusht_demos.num_episodes)])
    assert (spec.state_dim, spec.action_dim, spec.state_keys[0]) == (20, 2, "observation.environment_state")
    batch = data.batch(torch.tensor([100]))
    now = int(data.indices.now[100])
    np.testing.assert_array_equal(batch.obs["observation.state"][0], pusht_demos.read("state", now - 1, now + 1)[:, :2])
    keypoints = pusht_demos.read("keypoint", now - 1, now + 1).reshape(2, 18)
    np.testing.assert_array_equal(batch.obs["observation.environment_state"][0], keypoints)
    np.testing.assert_array_equal(batch.actions[0], pusht_demos.read("action", now - 1, now + 15))


def test_splits_share_the_memory(tiny_store):
    buffer = ReplayBuffer.open(tiny_store)
    keys = {"observation.state": "state", "action": "action"}
    (train, val), _ = load_windows(buffer, keys, Horizons(pred=8, act=4), [[0, 1, 2], [3]])
    assert train.arrays["action"].data_ptr() == val.arrays["action"].data_ptr()
    assert set(val.indices.episode) == {3}


def test_names_units_rate_and_instructions_of_the_store_reach_the_spec(tiny_store):
    buffer = ReplayBuffer.open(tiny_store)
    keys = {"observation.state": "state[1:3]", "action": "action"}
    _, spec = load_windows(buffer, keys, Horizons(pred=8, act=4), [[0]])
    assert spec.fields["observation.state"] == FieldSpec(shape=(2,), dtype="float32", names=("y", "a"), units="m")
    assert (spec.fps, spec.tasks) == (10, ("walk",))


@pytest.mark.parametrize(
    ("selection", "columns"),
    [("state", [0, 1, 2, 3, 4]), ("state[3]", [3]), ("state[-2:]", [3, 4]), ("state[:2]", [0, 1])],
)
def test_selection_takes_these_dimensions(tiny_store, selection, columns):
    buffer = ReplayBuffer.open(tiny_store)
    np.testing.assert_array_equal(read_role(buffer, "observation.state", selection), buffer.read("state")[:, columns])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"observation.state": "state"}, r"data.keys must name the action, got only \['observation.state'\]"),
        ({"action": "action"}, r"data.keys must name at least one observation"),
        (
            {"action": "action", "observation.state": "state", "observatoin.goal": "state"},
            "data.keys must be action, goal.image or observation.*, got 'observatoin.goal'",
        ),
        ({"action": "action", "observation.state": "state[5:]"}, "takes nothing; state has 5 numbers a step"),
        ({"action": "action", "observation.state": "stat"}, "stat"),
        ({"action": "action", "observation.images.top": "state[0:1]"}, "is an image; dimensions cannot be chosen"),
        ({"action": "action", "observation.state": "state[x]"}, "a key must read like"),
    ],
)
def test_keys_that_do_not_fit_the_store_are_named(tiny_store, keys, message):
    with pytest.raises(ValueError, match=message):
        load_windows(ReplayBuffer.open(tiny_store), keys, Horizons(pred=8, act=4), [[0]])
