"""Rollouts: an episode depends on its seed alone, and the statistics are those of its episodes."""

import json
import warnings

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from diffpolicy import rollout as rollouts
from diffpolicy.config import find_yaml
from diffpolicy.envs import make_env
from diffpolicy.executors import RecedingHorizon
from diffpolicy.metrics import bootstrap_interval, wilson_interval
from diffpolicy.rollout import check_fit, episode_generator, measure_latency, rollout, write_rollout
from diffpolicy.spec import DataSpec, FieldSpec

SHORT = {"max_steps": 24}
SEEDS = [100_000, 100_001, 7, 100_003, 5]


def spec_of(env_name: str, **choices) -> DataSpec:
    """What a policy trained on this environment would have been shown."""
    env = make_env(env_name, **choices)
    obs, _ = env.reset(seed=0)
    fields = {k: FieldSpec(shape=v.shape, dtype=str(v.dtype)) for k, v in obs.items()}
    if choices.get("pixels"):
        fields = {k: v for k, v in fields.items() if "images" in k or k == "observation.state"}
    return DataSpec(fields={**fields, "action": FieldSpec(shape=env.action_space.shape, dtype="float32")}, fps=env.fps)


@pytest.fixture
def make_tabletop_policy(make_policy):
    """An untrained policy that pushes about the whole table, so that contacts amplify the smallest difference."""

    def make(denoiser: str | dict, **choices):
        if isinstance(denoiser, str):
            denoiser = OmegaConf.to_container(OmegaConf.load(find_yaml(f"conf/denoiser/{denoiser}.yaml")))["denoiser"]
        encoder = {"name": "resnet", "crop_size": [40, 40]} if choices.get("pixels") else {"name": "state"}
        policy = make_policy(
            spec=spec_of("tabletop", **choices),
            denoiser=denoiser,
            encoder=encoder,
            horizons={"obs": 2, "pred": 16, "act": 8},
        )
        for key in policy.normalizer.shapes:
            size = policy.normalizer.shapes[key]
            policy.normalizer.fit(key, 512 * torch.rand(64, *size, generator=torch.Generator().manual_seed(0)))
        return policy

    return make


def outcomes(result) -> list[tuple]:
    return [(e.seed, e.score, e.steps, e.success, e.task) for e in result.episodes]


def play(policy, num_envs, num_workers, choices=None, seeds=SEEDS, **kwargs):
    executor = RecedingHorizon(policy, batch_size=16)
    return rollout(
        executor, "tabletop", choices or SHORT, seeds=seeds, num_envs=num_envs, num_workers=num_workers, **kwargs
    )


@pytest.mark.parametrize("denoiser", ["mlp", "transformer_small", "unet_small"])
def test_episodes_are_the_same_alone_or_side_by_side(make_tabletop_policy, denoiser):
    policy = make_tabletop_policy(denoiser)
    alone = outcomes(play(policy, 1, 0))
    assert [seed for seed, *_ in alone] == SEEDS
    assert len({score for _, score, *_ in alone}) > 1, "episodes that differ in nothing would prove nothing"
    for num_envs in (2, 16):
        assert outcomes(play(policy, num_envs, 0)) == alone


def test_episodes_are_the_same_in_worker_processes(make_tabletop_policy):
    policy = make_tabletop_policy("mlp")
    assert outcomes(play(policy, 16, 2)) == outcomes(play(policy, 1, 0))


def test_an_image_policy_plays_the_same_in_worker_processes_and_here(make_tabletop_policy):
    choices = {"max_steps": 16, "image_size": 48, "pixels": True}
    tiny = {"name": "unet", "down_dims": [8, 16], "kernel_size": 3, "n_groups": 4, "diffusion_step_embed_dim": 8}
    policy = make_tabletop_policy(tiny, **choices)
    assert policy.spec.image_keys
    here = outcomes(play(policy, 1, 0, choices, seeds=SEEDS[:3]))
    del choices["pixels"]  # a policy with cameras asks for pixels itself
    assert outcomes(play(policy, 3, 2, choices, seeds=SEEDS[:3])) == here


def test_an_episode_does_not_depend_on_the_seeds_beside_it(make_tabletop_policy):
    policy = make_tabletop_policy("mlp")
    all_of_them = {e[0]: e for e in outcomes(play(policy, 16, 0))}
    for seed in SEEDS[1:3]:
        assert outcomes(play(policy, 16, 0, seeds=[seed])) == [all_of_them[seed]]


def test_another_sampling_seed_gives_other_actions(make_tabletop_policy):
    policy = make_tabletop_policy("mlp")
    first, second = (outcomes(play(policy, 16, 0, sampling_seed=s)) for s in (0, 1))
    assert first != second and [e[0] for e in first] == [e[0] for e in second]


def test_noise_of_an_episode_depends_on_both_seeds():
    drawn = {(s, e): torch.rand(4, generator=episode_generator(s, e)).tolist() for s in range(3) for e in range(3)}
    assert len({tuple(v) for v in drawn.values()}) == 9
    assert drawn[1, 2] == torch.rand(4, generator=episode_generator(1, 2)).tolist()


class Countdown(gym.Env):
    """Over after seed % 10 + 1 steps, solved if the seed is even; the score is that number in tenths."""

    action_space = gym.spaces.Box(-10, 10, (2,))
    fps, task = 10.0, "wait"

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return self._obs(), {}

    def _obs(self):
        return {
            "observation.state": np.full(2, self.steps, np.float32),
            "observation.environment_state": np.zeros(3, np.float32),
        }

    def step(self, action):
        self.steps += 1
        last = self.steps == self.seed % 10 + 1
        return self._obs(), self.steps / 10, last, False, {"is_success": last and self.seed % 2 == 0}

    def render(self):
        return np.full((48, 48, 3), 20 * self.steps, np.uint8)


@pytest.fixture
def countdown(monkeypatch):
    for module in ("diffpolicy.rollout", "diffpolicy.envs.players"):
        monkeypatch.setattr(f"{module}.make_env", lambda name, **_: Countdown())


def count_down(policy, seeds, **kwargs):
    return rollout(RecedingHorizon(policy, batch_size=4), "countdown", seeds=seeds, num_workers=0, **kwargs)


def test_short_episodes_make_room_and_every_one_is_played_to_its_own_end(countdown, tiny_policy):
    """Tiny chunks are four steps: ten episodes of 1 to 10 steps in two places."""
    seeds, seen = [9, 0, 1, 8, 2, 3, 7, 4, 5, 6], []
    result = count_down(tiny_policy, seeds, num_envs=2, on_episode=lambda e: seen.append(e.seed))
    assert [e.seed for e in result.episodes] == seeds and sorted(seen) == sorted(seeds)
    assert [e.steps for e in result.episodes] == [seed + 1 for seed in seeds]
    assert [e.score for e in result.episodes] == pytest.approx([(seed + 1) / 10 for seed in seeds])
    assert [e.success for e in result.episodes] == [seed % 2 == 0 for seed in seeds]
    assert seen != seeds, "short ones end first"
    assert result.planned == 10


def test_summary_is_that_of_the_episodes(countdown, tiny_policy):
    result = count_down(tiny_policy, [0, 1, 2, 4, 9], num_envs=5)
    summary = result.summary()
    scores = np.array([0.1, 0.2, 0.3, 0.5, 1.0])
    assert summary["success_rate"] == 3 / 5 and summary["episodes"] == summary["episodes_planned"] == 5
    assert summary["success_interval_95"] == pytest.approx([0.2307, 0.8824], abs=1e-4)  # Wilson, by hand
    assert tuple(summary["success_interval_95"]) == wilson_interval(3, 5)
    assert summary["mean_score"] == pytest.approx(0.42)
    assert tuple(summary["mean_score_interval_95"]) == pytest.approx(bootstrap_interval(scores))
    assert summary["mean_steps"] == 4.2
    assert summary["call_batch_size"] == 4
    latency = summary["call_latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert all(e.chunk_latency_ms > 0 for e in result.episodes)


def test_a_single_call_has_no_latency_percentiles_since_the_first_warms_up(countdown, tiny_policy):
    assert count_down(tiny_policy, [0], num_envs=1).summary()["call_latency_ms"] is None


@pytest.mark.parametrize(
    ("seeds", "message"),
    [([], "at least one seed"), ([1, 2, 1], "seeds repeat; every episode needs a seed of its own")],
)
def test_seeds_that_cannot_be_are_refused(countdown, tiny_policy, seeds, message):
    with pytest.raises(ValueError, match=message):
        count_down(tiny_policy, seeds)


def test_an_environment_that_does_not_fit_is_named_with_the_key(tiny_policy, make_policy):
    with pytest.raises(ValueError, match=r"environment_state: the checkpoint has shape \(3,\), environment 'tabletop'"):
        check_fit(tiny_policy.spec, "tabletop", {})
    fields = {
        "observation.depth": FieldSpec(shape=(4,), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    }
    with pytest.raises(ValueError, match=r"needs observation.depth; environment 'tabletop' gives \['observation"):
        check_fit(DataSpec(fields=fields), "tabletop", {})
    with pytest.raises(ValueError, match=r"action: the checkpoint has shape \(7,\), environment 'tabletop' has \(2,\)"):
        check_fit(DataSpec(fields={"action": FieldSpec(shape=(7,), dtype="float32")}), "tabletop", {})


def test_another_control_rate_is_said_aloud():
    fields = {"action": FieldSpec(shape=(2,), dtype="float32")}
    with pytest.warns(UserWarning, match="trained at 30 Hz, environment 'tabletop' runs at 10 Hz"):
        check_fit(DataSpec(fields=fields, fps=30), "tabletop", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fit(DataSpec(fields=fields, fps=10), "tabletop", {})
        check_fit(DataSpec(fields=fields), "tabletop", {})


def interrupted_after(count: int):
    done = []

    def on_episode(episode):
        done.append(episode)
        if len(done) == count:
            raise KeyboardInterrupt

    return on_episode


def test_an_interrupted_rollout_keeps_its_episodes_and_says_that_they_are_biased(countdown, tiny_policy):
    with pytest.warns(UserWarning, match=r"interrupted: 3 of 10 episodes .*biased"):
        result = count_down(tiny_policy, range(10), num_envs=2, on_episode=interrupted_after(3))
    assert result.summary()["episodes"] == 3 and result.summary()["episodes_planned"] == 10


def test_an_interruption_before_the_first_episode_is_one(countdown, tiny_policy, monkeypatch):
    monkeypatch.setattr(RecedingHorizon, "plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        count_down(tiny_policy, range(10))


def test_results_films_and_contact_sheet_are_written_and_readable(countdown, tiny_policy, tmp_path):
    result = count_down(tiny_policy, range(20, 30), num_envs=4, num_films=2, num_pictures=5)
    assert {seed: len(frames) for seed, frames in result.films.items()} == {20: 2, 21: 3}  # with the first frame
    assert {seed: int(p.max()) for seed, p in result.pictures.items()} == {20 + i: 20 * (i + 1) for i in range(5)}
    out = write_rollout(result, tmp_path / "out", {"checkpoint": "c", "seed": 20}, fps=10)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "contact_sheet.png",
        "results.json",
        "videos/seed_20.mp4",
        "videos/seed_21.mp4",
    ]
    written = json.loads((out / "results.json").read_text())
    assert written["checkpoint"] == "c" and written["summary"]["success_rate"] == 0.5
    assert len(written["episodes"]) == 10
    wanted = {"seed", "score", "success", "steps", "task", "chunk_latency_ms"}
    assert all(episode.keys() == wanted for episode in written["episodes"])
    assert (written["episodes"][3]["seed"], written["episodes"][3]["steps"]) == (23, 4)
    film = iio.imread(out / "videos" / "seed_21.mp4")
    assert film.shape == (3, 48, 48, 3)
    np.testing.assert_allclose(film.mean(axis=(1, 2, 3)), [0, 20, 40], atol=6)
    sheet = iio.imread(out / "contact_sheet.png")
    assert sheet.ndim == 3 and sheet.shape[1] > 4 * 144
    colours = {tuple(c) for c in sheet.reshape(-1, 3)}
    assert {(46, 160, 67), (207, 34, 46)} <= colours, "solved are framed green, others red"


def test_without_films_and_pictures_only_numbers_are_written(countdown, tiny_policy, tmp_path):
    out = write_rollout(count_down(tiny_policy, range(3)), tmp_path / "out", {}, fps=10)
    assert [p.name for p in out.iterdir()] == ["results.json"]


def test_a_real_film_shows_the_scene(make_tabletop_policy, tmp_path):
    result = play(make_tabletop_policy("mlp"), 2, 0, {"max_steps": 6}, seeds=[1, 2], num_films=1)
    out = write_rollout(result, tmp_path, {}, fps=10)
    film = iio.imread(out / "videos" / "seed_1.mp4")
    env = make_env("tabletop", max_steps=6)
    env.reset(seed=1)
    assert film.shape == (7, *env.render().shape)
    assert np.abs(film[0].astype(float) - env.render()).mean() < 8


def test_pixels_are_stepped_in_processes_by_default_and_numbers_are_not(countdown, tiny_policy, monkeypatch):
    made = []
    monkeypatch.setattr(rollouts, "ProcessPlayers", lambda *a: made.append("process") or rollouts.LocalPlayers(*a[:4]))
    rollout(RecedingHorizon(tiny_policy, batch_size=4), "countdown", seeds=range(4), num_envs=2)
    assert made == []
    rollout(RecedingHorizon(tiny_policy, batch_size=4), "countdown", seeds=range(4), num_envs=2, num_workers=2)
    assert made == ["process"]


def test_latency_of_one_observation_is_measured_on_a_batch_of_one(countdown, tiny_policy):
    sizes = []
    sample = type(tiny_policy).sample_actions
    tiny_policy.sample_actions = lambda obs, **kw: (
        sizes.append(len(obs["observation.state"])) or sample(tiny_policy, obs, **kw)
    )
    latency = measure_latency(RecedingHorizon(tiny_policy, batch_size=16), "countdown", num_calls=5)
    assert set(sizes) == {1} and len(sizes) == 8
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
