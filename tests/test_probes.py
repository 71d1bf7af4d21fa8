"""Probes of instructions: policies whose obedience is known are told apart, and every number is that of the episodes."""

import csv
import io
import json
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from rich.console import Console

from diffpolicy import evaluate
from diffpolicy.checkpoint import save_policy
from diffpolicy.config import build_policy, config_from_dict
from diffpolicy.envs import ENVIRONMENTS
from diffpolicy.envs.base import LanguageEnv, Wordings
from diffpolicy.envs.players import EpisodePlayer
from diffpolicy.metrics import holm, wilson_interval
from diffpolicy.probe_report import scene_sheet, write_figures, write_films, write_numbers
from diffpolicy.probe_table import by_goal, compare, csv_rows, explanation, goal_table, share_following, summarise
from diffpolicy.probes import Probes, Row, foreign_frames, parse_probes, play_probes, say
from diffpolicy.rollout import Episode, RolloutResult, goal_summary, rollout
from diffpolicy.spec import DataSpec, FieldSpec, Horizons
from tests.test_cli import run as run_cli

STATE, LAMP, CAMERA = "observation.state", "observation.environment_state", "observation.images.top"
WAYS = {"go left": (-1.0, 0.0), "go right": (1.0, 0.0), "go up": (0.0, 1.0), "go down": (0.0, -1.0)}
LAMPS = list(WAYS)
SEEDS = range(100, 120)


@dataclass(frozen=True, kw_only=True)
class LampsConfig:
    max_steps: int = 6
    pixels: bool = False
    goal: str = ""
    goals: str = "train"
    wordings: str = "seen"
    swap: bool = False
    start_up: bool = False
    """Begin where `go up` is fulfilled already."""


class LampsEnv(LanguageEnv):
    """A point in the plane, asked to go one of four ways; a lamp tells the way that the seed asks without swap.

    A goal is fulfilled a unit away from the middle; its reward is the share of that unit. Down is held out.
    """

    wordings = MappingProxyType({n: Wordings((n, f"please {n}"), (f"move {n[3:]}",)) for n in WAYS})
    held_out = ("go down",)
    scene_goals = tuple(WAYS)
    action_space = gym.spaces.Box(-1, 1, (2,))
    fps = 10.0

    def __init__(self, config):
        self.config, self.max_steps = config, config.max_steps

    def reset(self, *, seed=None, options=None):
        draw = np.random.default_rng([seed, 1])
        allowed = {"train": LAMPS[:3], "held_out": LAMPS[3:], "all": LAMPS}[self.config.goals]
        natural = self.config.goal or allowed[draw.integers(len(allowed))]
        others = [name for name in LAMPS[:3] if name != natural]
        self.goal = others[draw.integers(2)] if self.config.swap else natural
        wordings = self.wordings[self.goal]
        sentences = wordings.unseen if self.config.wordings == "unseen" else wordings.seen
        self.task = sentences[np.random.default_rng([seed, 2]).integers(len(sentences))]
        self.lamp, self.steps = LAMPS.index(natural), 0
        self.xy = np.array([0.02 * np.random.default_rng(seed).random(), 1.5 if self.config.start_up else 0.0])
        return self._observe(), {"goals_reached": self._judge()["goals_reached"]}

    def _observe(self):
        obs = {STATE: self.xy.astype(np.float32), LAMP: np.eye(4, dtype=np.float32)[self.lamp]}
        return obs | ({CAMERA: np.full((8, 8, 3), 50 * self.lamp, np.uint8)} if self.config.pixels else {})

    def _judge(self):
        rewards = {name: float(np.clip(self.xy @ way, 0, 1)) for name, way in WAYS.items()}
        return {"goal_rewards": rewards, "goals_reached": tuple(n for n, r in rewards.items() if r > 0.99)}

    def step(self, action):
        self.xy, self.steps = self.xy + action, self.steps + 1
        info = self._judge()
        success = self.goal in info["goals_reached"]
        info["is_success"] = success
        return self._observe(), info["goal_rewards"][self.goal], success, self.steps >= self.max_steps, info

    def render(self):
        return np.full((32, 32, 3), 40 * self.lamp, np.uint8)

    def get_state(self):
        return self.xy

    def action_to_pixels(self, actions):
        return actions


@pytest.fixture(autouse=True)
def lamps(monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS, "lamps", (LampsConfig, LampsEnv))


SPEC = DataSpec(
    fields={
        STATE: FieldSpec(shape=(2,), dtype="float32"),
        LAMP: FieldSpec(shape=(4,), dtype="float32"),
        "action": FieldSpec(shape=(2,), dtype="float32"),
    },
    fps=10,
)
SEEING = DataSpec(fields={**SPEC.fields, CAMERA: FieldSpec(shape=(8, 8, 3), dtype="uint8")}, fps=10)


def obedient(words: str, lamp: int) -> str:
    """Goes where the words of the demonstrations say, and nowhere without."""
    return words.removeprefix("please ") if words else ""


def deaf(words: str, lamp: int) -> str:
    """Goes where the lamp says."""
    return LAMPS[lamp]


class Scripted:
    """An executor that decides by words and lamp, and remembers what it was given."""

    batch_size = None

    def __init__(self, decide, spec=SPEC, droppable=()):
        self.decide, self.given, self.noise = decide, [], []
        encoder = SimpleNamespace(cond=SimpleNamespace(kinds=("frame", "text")))
        self.policy = SimpleNamespace(
            spec=spec,
            horizons=Horizons(obs=2, pred=4, act=3),
            encoder=encoder,
            droppable=frozenset(droppable),
            eval=lambda: None,
        )

    def plan(self, obs, generators):
        self.given.append({key: value if key == "task" else np.array(value) for key, value in obs.items()})
        self.noise.append([torch.rand(1, generator=g).item() for g in generators])
        lamps = obs[LAMP][:, -1].argmax(axis=1) if LAMP in obs else np.zeros(len(obs["task"]), int)
        ways = [WAYS.get(self.decide(words, lamp), (0.0, 0.0)) for words, lamp in zip(obs["task"], lamps, strict=True)]
        return 0.5 * np.array(ways)[:, None].repeat(3, axis=1)


def probe(decide, names="language", *, seeds=SEEDS, choices=None, spec=SPEC, droppable=(), **how):
    executor = Scripted(decide, spec, droppable)
    return play_probes(executor, "lamps", choices or {}, parse_probes(names), seeds=seeds, num_workers=0, **how)


def rates(probes, key) -> dict:
    return {s["probe"]: s[key] and s[key]["rate"] for s in summarise(probes)}


# ------------------------------------------------------------------------------------------------- what the table tells


def test_a_policy_that_obeys_follows_swapped_words_and_ignores_none():
    probes = probe(obedient)
    assert rates(probes, "follows") == {"asked": 1, "swapped": 1, "paraphrase": 0, "held_out": 1}
    assert rates(probes, "ignores") == {"asked": None, "swapped": 0, "paraphrase": None, "held_out": None}
    share = share_following(probes)
    assert (share["count"], share["trials"]) == (40, 40) and tuple(share["interval_95"]) == wilson_interval(40, 40)


def test_a_policy_that_looks_at_the_scene_alone_has_a_full_score_and_is_found_out_by_swapped_words():
    probes = probe(deaf)
    assert rates(probes, "follows") == {"asked": 1, "swapped": 0, "paraphrase": 1, "held_out": 1}
    swapped = summarise(probes)[1]
    assert (swapped["ignores"]["rate"], swapped["other"]["rate"]) == (1, 0)
    assert (swapped["score"]["mean"], swapped["ignored_score"]["mean"]) == (pytest.approx(0, abs=0.02), 1)
    assert share_following(probes)["rate"] == 0.5
    (worse, *_) = compare(probes)
    assert (worse.probe, worse.follows.value, worse.follows.p) == ("swapped", -1, 2 / 2**20)
    assert worse.follows.verdict(20) == worse.score.verdict(20) == "lower"


def test_a_third_goal_is_neither_followed_nor_ignored():
    natural = {e.seed: e.goal for e in probe(deaf, "asked")["asked"].episodes}
    swapped = probe(deaf, "swapped")["swapped"].episodes
    third = {e.seed: next(n for n in LAMPS[:3] if n not in (natural[e.seed], e.goal)) for e in swapped}
    assert set(third.values()) == set(LAMPS[:3])
    probes = probe(lambda words, lamp: "go down")
    assert [s["other"]["rate"] for s in summarise(probes)] == [1, 1, 1, 0]  # held_out asks for it
    assert rates(probes, "ignores")["swapped"] == 0


def test_rows_play_the_same_scenes_with_the_same_noise_and_other_words():
    executor = Scripted(lambda *_: "")
    names = ["asked", "swapped", "paraphrase"]
    play_probes(executor, "lamps", {}, names, seeds=SEEDS, num_workers=0, num_envs=20)
    asked, swapped, paraphrase = (executor.given[i] for i in (0, 2, 4))  # six steps are two looks
    for row in (swapped, paraphrase):
        np.testing.assert_array_equal(row[STATE], asked[STATE])
        np.testing.assert_array_equal(row[LAMP], asked[LAMP])
        assert all(a != b for a, b in zip(row["task"], asked["task"], strict=True))
    assert executor.noise[0] == executor.noise[2] == executor.noise[4]
    assert executor.noise[0] != executor.noise[1]


def test_goals_of_the_break_down_are_those_of_the_episodes():
    probes = hand_made(
        asked=[("A", {"A": 1.0, "B": 0.25}, ("A",)), ("B", {"A": 0.5, "B": 0.5}, ())],
        swapped=[("B", {"A": 1.0, "B": 0.75}, ("A",)), ("A", {"A": 0.25, "B": 1.0}, ("B",))],
    )
    first, second = by_goal(probes)
    assert (first["goal"], first["asked"]["success"]["rate"], first["asked"]["score"]["mean"]) == ("A", 1, 1)
    assert (first["swapped"]["success"]["rate"], first["swapped"]["score"]["mean"]) == (0, 0.25)
    assert (first["score_when_not_named"]["mean"], second["score_when_not_named"]["mean"]) == (0.75, 0.625)
    swapped = summarise(probes)[1]
    assert (swapped["ignores"]["count"], swapped["other"]["count"], swapped["ignored_score"]["mean"]) == (2, 0, 1)
    assert share_following(probes) == {
        "count": 1,
        "trials": 3,
        "rate": 1 / 3,
        "interval_95": list(wilson_interval(1, 3)),
    }
    assert goal_table(probes).row_count == 2
    many = hand_made(asked=[(f"goal {i}", {f"goal {i}": 1.0}, ()) for i in range(13)])
    assert goal_table(many) is None and len(by_goal(many)) == 13


def hand_made(**rows) -> Probes:
    """Probes of given (goal, scores, reached) per episode; seeds 0, 1, ..."""
    probes = Probes()
    for name, given in rows.items():
        episodes = [
            Episode(i, scores.get(goal, 0.0), goal in reached, 1, f"to {goal}", 1.0, goal, scores, reached)
            for i, (goal, scores, reached) in enumerate(given)
        ]
        probes.rows.append(Row(name, "", RolloutResult(episodes, [], 1, 1.0, len(episodes))))
    return probes


def reach(*successes: bool) -> list:
    return [("A", {"A": float(s), "B": 0.0}, ("A",) if s else ()) for s in successes]


def test_a_goal_that_the_scene_does_not_allow_can_be_ignored_but_not_followed():
    """As in environments whose scene holds one task only: words of another cannot be followed there."""
    probes = hand_made(asked=reach(True, True), swapped=[("B", {"A": 1.0}, ("A",)), ("B", {"A": 0.5}, ())])
    swapped = summarise(probes)[1]
    assert (swapped["follows"], swapped["score"], swapped["ignores"]["rate"]) == (None, None, 0.5)
    assert compare(probes) == []
    assert any(line.startswith("swapped: these scenes do not allow the goal") for line in explanation(probes))


def test_an_episode_that_reached_two_goals_did_not_follow():
    both = [("A", {"A": 1.0, "B": 1.0}, ("B", "A")), *reach(True)]
    probes = hand_made(asked=both, swapped=both)
    assert (share_following(probes)["count"], share_following(probes)["trials"]) == (2, 4)
    assert goal_summary(probes["asked"].episodes)["followed_share"]["count"] == 1


@pytest.mark.parametrize(
    ("asked", "other", "verdict"),
    [
        ([True] * 30, [False] * 30, "lower"),
        ([False] * 30, [True] * 30, "higher"),
        ([True] * 30, [True] * 30, "not told apart (no difference seen, so no number of episodes can be named)"),
        ([True] * 30, [True] * 28 + [False] * 2, "not told apart: 110 more episodes would be needed"),
    ],
)
def test_what_is_not_told_apart_is_never_called_the_same(asked, other, verdict):
    probes = hand_made(asked=reach(*asked), paraphrase=reach(*other))
    assert compare(probes)[0].follows.verdict(30).startswith(verdict)
    said = " ".join(explanation(probes))
    assert "the same as" not in said and "equal to" not in said and "Wilson" in said


def test_p_values_are_corrected_for_all_rows_together():
    half = [True] * 24 + [False] * 6
    probes = hand_made(asked=reach(*[True] * 30), swapped=reach(*half), paraphrase=reach(*half))
    one, two = compare(probes)
    p_values = [one.follows.p, two.follows.p, one.score.p, two.score.p]
    assert p_values[:2] == [2 / 2**6] * 2 and p_values[2] == pytest.approx(2 / 2**6, abs=0.01)
    assert [one.follows.holm_p, two.follows.holm_p, one.score.holm_p, two.score.holm_p] == holm(p_values)
    assert one.follows.holm_p > one.follows.p


def test_scores_tell_apart_what_hardly_ever_succeeds():
    near, far = [[("A", {"A": 0.8 - d * (0.3 + 0.01 * i)}, ()) for i in range(20)] for d in (0, 1)]
    (c,) = compare(hand_made(asked=near, paraphrase=far))
    assert c.follows.needed is None and c.follows.verdict(20).startswith("not told apart")
    assert c.score.verdict(20) == "lower" and c.score.value == pytest.approx(-0.395)


# ---------------------------------------------------------------------------------- goals that episodes keep track of


def test_an_episode_knows_what_it_was_asked_and_how_far_it_came_at_every_goal():
    (episode, *_) = rollout(Scripted(deaf), "lamps", {"swap": True}, seeds=[3], num_workers=0).episodes
    way = next(name for name in WAYS if name in episode.goals_reached)
    assert episode.goal in WAYS and episode.goals_reached == (way,) and way != episode.goal
    assert episode.goal_scores.keys() == set(WAYS) and episode.goal_scores[way] == episode.best_other_score == 1
    assert episode.score == episode.goal_scores[episode.goal] and not episode.success
    written = episode.to_dict()
    assert (written["goal"], written["goals_reached"]) == (episode.goal, episode.goals_reached)


def test_goals_fulfilled_from_the_start_do_not_count_unless_undone_and_fulfilled_again():
    player = EpisodePlayer("lamps", {"goal": "go left", "start_up": True}, 2)
    player.start(0, False, False)
    stayed = player.play(np.zeros((2, 2)))
    assert stayed.goals_reached == () and "go up" not in stayed.goal_scores and "go left" in stayed.goal_scores
    again = player.play(np.array([[0.0, -1.0], [0.0, 1.0]]))
    assert again.goals_reached == ("go up",)


def test_a_plain_rollout_sums_up_what_was_followed_and_what_was_not(tmp_path):
    told = rollout(Scripted(deaf), "lamps", {"swap": True}, seeds=SEEDS, num_workers=0).summary()["goals"]
    assert (told["ignores"]["rate"], told["followed_share"]["rate"], told["other_score"]) == (1, 0, 1)
    none = goal_summary(rollout(Scripted(lambda *_: ""), "lamps", seeds=SEEDS, num_workers=0).episodes)
    assert none["followed_share"] == {"count": 0, "trials": 0, "rate": None, "interval_95": None}


# ------------------------------------------------------------------------------------------ what the policy gets instead


def test_words_are_hidden_only_from_a_policy_that_may_miss_them():
    trained_without = probe(obedient, "empty")
    assert trained_without.left_out == {"empty": "not allowed: trained without encoder.task_dropout"}
    probes = probe(obedient, "empty", droppable=["task"])
    assert [e.task for e in probes["empty"].episodes] == [""] * len(SEEDS)
    assert rates(probes, "follows") == {"asked": 1, "empty": 0}
    assert probes["empty"].how == "words hidden (learned null)"
    assert [e.goal for e in probes["empty"].episodes] == [e.goal for e in probes["asked"].episodes]


def test_words_can_be_replaced_by_a_function_of_them():
    backwards = {"go left": "go right", "go right": "go left", "go up": "go down"}
    change = say(lambda words: backwards[words.removeprefix("please ")])
    (left,) = rollout(
        Scripted(obedient), "lamps", {"goal": "go left"}, seeds=[0], num_workers=0, change=change
    ).episodes
    assert (left.task, left.goal, left.goals_reached) == ("go right", "go left", ("go right",))


@pytest.mark.parametrize(
    ("name", "part", "keys"), [("state_only", CAMERA, {CAMERA}), ("image_only", "state", {STATE, LAMP})]
)
def test_a_sense_is_hidden_where_the_policy_may_miss_it(name, part, keys):
    executor = Scripted(obedient, SEEING, [part])
    probes = play_probes(executor, "lamps", {}, ["asked", name], seeds=[1, 2], num_workers=0)
    shown, hidden = executor.given[0].keys(), executor.given[-1].keys()
    assert shown - hidden == keys and "hidden (learned null)" in probes[name].how
    assert rates(probes, "follows") == {"asked": 1, name: 1}


def test_a_sense_that_must_be_there_shows_the_start_of_another_scene():
    executor = Scripted(lambda *_: "go left", SEEING)
    seeds = list(SEEDS)
    probes = play_probes(executor, "lamps", {}, ["asked", "image_only"], seeds=seeds, num_workers=0, num_envs=20)
    env = LampsEnv(LampsConfig(pixels=True))
    wanted = np.stack([[env.reset(seed=s + 1)[0][LAMP]] * 2 for s in seeds])
    given = executor.given[executor.noise.index(executor.noise[0], 1)]  # the first call of the second row
    np.testing.assert_array_equal(given[LAMP], wanted)
    np.testing.assert_array_equal(given[CAMERA], executor.given[0][CAMERA])
    assert not np.array_equal(wanted, executor.given[0][LAMP])
    assert probes["image_only"].how == "state of another scene (trained without their dropout)"
    frames = foreign_frames("lamps", {}, [LAMP], [7])
    np.testing.assert_array_equal(frames[7][LAMP], env.reset(seed=8)[0][LAMP])


def test_probes_that_say_nothing_here_give_their_reason():
    assert probe(obedient, choices={"goal": "go up"}).left_out == {
        "empty": "not allowed: trained without encoder.task_dropout",
        "held_out": "env.goal='go up' asks for one goal only",
        "state_only": "the policy has no camera",
        "image_only": "the policy has no camera",
    }
    already = probe(obedient, "held_out", choices={"goals": "held_out"})
    assert already.left_out == {"held_out": "env.goals=held_out: asked is it already"}


def test_options_that_rows_choose_themselves_are_said_to_be_ignored():
    with pytest.warns(UserWarning, match="env.swap=True is ignored: every row of --probe has its own"):
        probes = probe(deaf, "asked", choices={"swap": True})
    assert rates(probes, "follows") == {"asked": 1}


# ------------------------------------------------------------------------------------------------------------- files


def test_files_hold_what_was_played(tmp_path):
    probes = probe(deaf, "swapped,empty", num_films=1, num_pictures=3)
    for row in probes.rows:
        write_films(row, tmp_path, fps=10)
    write_numbers(probes, tmp_path, {"checkpoint": "c"})
    written = write_figures(probes, tmp_path, "lamps")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "probes.csv", "probes.json", "probes.png", "same_scene.png",
        "videos/asked_seed_100.mp4", "videos/swapped_seed_100.mp4",
    ]  # fmt: skip
    assert [p.name for p in written] == ["probes.png", "same_scene.png"]
    told = json.loads((tmp_path / "probes.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert told["checkpoint"] == "c" and told["left_out"].keys() == {"empty"}
    assert [r["probe"] for r in told["rows"]] == ["asked", "swapped"]
    assert len(told["episodes"]["swapped"]) == 20 and told["episodes"]["swapped"][0]["goal"] in WAYS
    with open(tmp_path / "probes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["probe"] for r in rows] == ["asked", "swapped", "empty"]
    assert (rows[1]["ignores"], rows[1]["ignores_count"], rows[1]["follows_verdict"]) == ("1.0", "20", "lower")
    assert rows[2]["left_out"].startswith("not allowed") and rows[2]["follows"] == ""
    assert csv_rows(probes)[1]["follows_high"] == pytest.approx(wilson_interval(0, 20)[1])


def test_sheet_of_scenes_frames_what_was_followed_green_and_what_was_not_orange():
    probes = probe(deaf, "swapped", num_pictures=2)
    sheet = scene_sheet(probes)
    colours = {tuple(c) for c in sheet.reshape(-1, 3)}
    assert {(46, 160, 67), (230, 120, 0)} <= colours and (207, 34, 46) not in colours
    assert sheet.shape[1] == 2 * 210 + 8 and sheet.shape[0] > 2 * 210
    assert scene_sheet(probe(deaf, "swapped")) is None


def test_an_interrupted_probe_keeps_the_rows_that_are_finished():
    def on_start(name):
        def on_episode(episode):
            if name == "paraphrase" and episode.seed == SEEDS[5]:
                raise KeyboardInterrupt

        return on_episode

    with pytest.warns(UserWarning, match="interrupted: "):
        probes = probe(deaf, on_start=on_start, num_envs=2)
    asked, swapped, paraphrase = probes.rows
    assert asked.complete and swapped.complete and not paraphrase.complete
    assert probes.left_out["held_out"] == "not played: interrupted"
    assert [c.probe for c in compare(probes)] == ["swapped"], "what was cut short is biased, so it is not tested"
    assert share_following(probes)["trials"] == 40


# ------------------------------------------------------------------------------------------------- from the command line


def test_rows_are_named_in_any_order_and_asked_is_always_among_them():
    assert parse_probes("swapped") == ["asked", "swapped"]
    assert parse_probes("paraphrase, empty") == ["asked", "empty", "paraphrase"]
    assert parse_probes("language")[0] == "asked" and len(parse_probes("language")) == 7
    with pytest.raises(ValueError, match="Did you mean 'swapped'"):
        parse_probes("swaped")


def config_of(**sections):
    return config_from_dict(
        {
            "task": "lamps",
            "data": {"keys": {STATE: "state", LAMP: "lamp", "action": "action"}},
            "env": {"name": "lamps"},
            "horizons": {"obs": 2, "pred": 8, "act": 4},
            "encoder": {"name": "clip", "token_dim": 16, "task_dropout": 0.1},
            "denoiser": {"name": "mlp", "width": 16, "depth": 1, "embed_dim": 8},
            "process": {"name": "flow"},
            "sampler": {"num_inference_steps": 2},
            **sections,
        }
    )


def checkpoint_of(config, folder):
    torch.manual_seed(0)
    policy = build_policy(config, SPEC)
    for key, size in ((STATE, 2), (LAMP, 4), ("action", 2)):
        policy.normalizer.fit(key, torch.rand(20, size))
    return save_policy(policy, config, folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A policy with words and nothing learned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENTS, "lamps", (LampsConfig, LampsEnv))
        return checkpoint_of(config_of(), tmp_path_factory.mktemp("lamps") / "policy")


def test_the_command_probes_a_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    wanted = ("--probe", "swapped,empty,image_only", "--episodes", 3, "--videos", 1, "--out", tmp_path / "here")
    code, out, err = run_cli("rollout", checkpoint, *wanted, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and err == "", err
    for text in (
        "follows",
        "ignores",
        "empty: same scene, no words",
        "image_only: the policy has no camera",
        "by goal",
    ):
        assert text in out
    assert "minus asked" in out and "Holm" in out
    told = json.loads((tmp_path / "here" / "probes.json").read_text())
    assert [r["probe"] for r in told["rows"]] == ["asked", "swapped", "empty"]
    assert (told["env"]["name"], told["seed"]) == ("lamps", 100_000)
    assert iio.imread(tmp_path / "here" / "same_scene.png").ndim == 3
    assert len(list((tmp_path / "here" / "videos").iterdir())) == 3


def test_results_of_a_probe_stand_beside_the_checkpoint_under_a_name_of_their_own(checkpoint):
    few = {"episodes": 2, "videos": 0, "pictures": 0, "console": Console(file=io.StringIO())}
    outs = [evaluate.probe(checkpoint, "asked", **few)[1] for _ in range(2)]
    name = "probe_lamps_policy_euler-2_seed100000x2"
    assert outs == [checkpoint / "rollouts" / name, checkpoint / "rollouts" / f"{name}-2"]


def test_a_rollout_with_words_shows_what_was_ignored(checkpoint, tmp_path):
    console = Console(file=io.StringIO(), width=160)
    _, out = evaluate.evaluate(checkpoint, episodes=2, videos=0, pictures=0, out=tmp_path / "out", console=console)
    text = console.file.getvalue()
    assert "ignores: reached a goal not named" in text and "follows, of those that reached any goal" in text
    (first, _) = json.loads((out / "results.json").read_text())["episodes"]
    assert first["goal"] in WAYS and first["goal_scores"].keys() == set(WAYS) and "goals_reached" in first


def test_without_words_there_is_nothing_to_probe_and_one_line_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    silent = checkpoint_of(config_of(encoder={"name": "state"}), tmp_path / "silent")
    for path, options, line in (
        (silent, (), "--probe needs a policy that reads words"),
        (checkpoint, ("--probe", "swapt"), "--probe must be one of"),
    ):
        arguments = ("--episodes", 2, "--out", tmp_path / "out", "--probe", "language", *options)
        code, _, err = run_cli("rollout", path, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and line in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"needs an environment that asks in words, one of .*'tabletop' has one goal"):
        play_probes(Scripted(deaf), "tabletop", {}, ["asked"], seeds=[1])
