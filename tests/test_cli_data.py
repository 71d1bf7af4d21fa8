"""`diffpolicy data`: what it prints, and how it ends."""

import subprocess
import sys

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from diffpolicy.cli_data import app, parse_episodes
from diffpolicy.replay import ReplayBuffer
from tests.test_replay import demonstration, make_store, make_v2_store, real


def run(*arguments: object) -> tuple[int, str]:
    """(exit code, output); errors that the main command line turns into one line come out as they are."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    return result.exit_code, result.output


def test_importing_the_commands_imports_nothing_heavy():
    code = (
        "import sys, diffpolicy.cli_data; sys.exit(any(m in sys.modules for m in ('zarr', 'numpy', 'torch', 'rich')))"
    )
    preload = "import typer; import sys; sys.modules.pop('rich', None); "  # typer may bring rich along
    assert subprocess.run([sys.executable, "-c", preload + code]).returncode == 0


def test_info_shows_episodes_keys_ranges_names_and_instructions(tmp_path):
    code, output = run("info", make_store(tmp_path / "a.zarr", 6))
    assert code == 0
    lines = output.splitlines()

    def row(start: str) -> str:
        return next(line for line in lines if line.strip("│ ").startswith(start))

    assert row("format").split()[1:3] == ["zarr", "v3,"]
    assert row("episodes").split()[1] == "6" and row("steps").split()[1] == "135"
    assert row("duration").split()[1:] == ["14", "s"]
    assert "20 / 22.5 / 25 steps" in row("lengths")
    for word in ("observation.images.top", "40x40x3", "uint8", "0 .. 255"):
        assert word in row("img")
    assert "[m, m, rad]" in row("state") and row("state").endswith("x     │")
    state = np.concatenate([demonstration(i)["state"] for i in range(6)])
    assert f"{state[:, 0].min():.4g} .. {state[:, 0].max():.4g}" in row("state")
    assert [output.count(text) for text in ("2 │ push the T", "2 │ push the L", "2 │ (none)")] == [1, 1, 1]


def test_info_works_without_episodes_and_on_zarr_v2(tmp_path):
    make_store(tmp_path / "a.zarr", 0)
    assert "no" not in run("info", tmp_path / "a.zarr")[1].split()[:4]
    code, output = run("info", make_v2_store(tmp_path / "b.zarr"))
    assert code == 0 and "zarr v2" in output and "unknown" in output and "duration" not in output


def test_info_of_real_pusht_shows_the_known_ranges():
    code, output = run("info", real("pusht_cchi_v7_replay.zarr"))
    assert code == 0
    for fact in ("206", "25,650", "49 / 122 / 246 steps", "12 .. 511", "13.46 .. 496.1", "... and 15 more"):
        assert fact in output


@pytest.mark.parametrize("command", ["info", "drop", "convert"])
def test_an_unreadable_store_is_an_error_for_the_main_command_line(tmp_path, command):
    rest = {"info": (), "drop": ("--episodes", "0"), "convert": (tmp_path / "b.zarr",)}[command]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(command, tmp_path / "nothing.zarr", *rest)


def test_validate_of_a_sound_store_ends_with_0(tmp_path):
    code, output = run("validate", make_store(tmp_path / "a.zarr"))
    assert code == 0 and "no errors, no warnings" in output


def test_validate_with_warnings_only_ends_with_0(tmp_path):
    state = np.full((86, 3), 0.25, np.float32)
    code, output = run("validate", make_v2_store(tmp_path / "a.zarr", state=state))
    assert code == 0 and "no errors, 1 warning" in output
    assert output.startswith("warning") and "data/state" in output


def test_validate_with_errors_ends_with_1_and_names_the_file(tmp_path):
    path = make_store(tmp_path / "a.zarr")
    (path / "data/action/c/0/0").unlink()
    code, output = run("validate", path)
    assert code == 1 and "1 error, no warnings" in output
    assert output.startswith("error") and "data/action/c/0/0: the file is missing" in output


@pytest.mark.parametrize("name", ["nothing.zarr", "empty"])
def test_validate_of_what_is_no_store_ends_with_1(tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert run("validate", tmp_path / name)[0] == 1


def test_a_message_with_brackets_is_printed_as_it_is(tmp_path):
    """rich would take [0] or [red] for its own."""
    state = np.full((86, 3), 0.25, np.float32)
    path = make_v2_store(tmp_path / "[red]a.zarr", state=state)
    output = run("validate", path)[1]
    assert "[0] = 0.25, [1] = 0.25" in output and "[red]a.zarr" in output
    with ReplayBuffer.create(tmp_path / "b.zarr", fields=ReplayBuffer.open(path).fields, fps=1) as buffer:
        buffer.append_episode(ReplayBuffer.open(path).episode(0), task="push [bold] [/] it")
    assert "push [bold] [/] it" in run("info", tmp_path / "b.zarr")[1]


def test_drop_says_what_is_left(tmp_path):
    path = make_store(tmp_path / "a.zarr", 6)
    code, output = run("drop", path, "--episodes", "0,2-3")
    assert code == 0 and "dropped 3 episodes" in output and "has 3 episodes, 70 steps" in output
    np.testing.assert_array_equal(ReplayBuffer.open(path).episode(1)["action"], demonstration(4)["action"])


def test_convert_takes_rate_roles_and_task(tmp_path):
    src, dst = make_v2_store(tmp_path / "a.zarr"), tmp_path / "b.zarr"
    code, output = run("convert", src, dst, "--fps", 10, "--role", "img=observation.images.top", "--task", "push the T")
    assert code == 0 and "has 4 episodes, 86 steps" in output
    buffer = ReplayBuffer.open(dst)
    assert (buffer.fps, buffer.tasks, buffer.roles["img"]) == (10, ("push the T",), "observation.images.top")
    assert zarr.open_group(dst)["data/img"].dtype == np.uint8
    with pytest.raises(ValueError, match="KEY=ROLE"):
        run("convert", src, tmp_path / "c.zarr", "--role", "img")


def test_merge_says_what_became_of_the_sources(tmp_path):
    sources = make_v2_store(tmp_path / "a.zarr"), make_store(tmp_path / "b.zarr")
    out, file = tmp_path / "two.zarr", tmp_path / "words.txt"
    file.write_text("shove it\nslide it\n")
    told = "--instruction", "push it | move it", "--instruction", f"@{file}"
    code, output = run("merge", *sources, "--out", out, *told, "--seed", 3, "--role", "state=observation.pose")
    assert code == 0 and "merged 4 + 4 episodes" in output and "has 8 episodes, 172 steps" in output
    assert "note: img becomes uint8 (float32 and uint8 in the sources)" in output
    buffer = ReplayBuffer.open(out)
    tasks = [buffer.episode_task(i) for i in range(8)]
    assert sorted(tasks[:4]) == ["move it"] * 2 + ["push it"] * 2
    assert sorted(tasks[4:]) == ["shove it"] * 2 + ["slide it"] * 2
    assert buffer.roles["state"] == "observation.pose"
    code, output = run("merge", *sources, "--out", tmp_path / "c.zarr", "--keys", "action, img", *told)
    assert "left out state: not among the keys to keep" in output
    assert ReplayBuffer.open(tmp_path / "c.zarr").keys == ("action", "img")


def test_merge_takes_the_sentences_of_an_environment_by_the_names_of_its_goals(tmp_path):
    from diffpolicy.envs.pusht_language import CENTRE, LOWER_RIGHT

    store = make_v2_store(tmp_path / "a.zarr")
    goals = "--instruction", CENTRE.seen[0], "--instruction", LOWER_RIGHT.seen[0]
    code, output = run("merge", store, store, "--out", tmp_path / "b.zarr", "--wordings", "pusht_language", *goals)
    assert code == 0 and "8 of 12 wordings" in output
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    for i, words in enumerate([CENTRE] * 4 + [LOWER_RIGHT] * 4):
        assert buffer.episode_task(i) in words.seen
    with pytest.raises(
        ValueError, match=r"with --wordings pusht_language an --instruction must be one of .*Did you mean"
    ):
        run("merge", store, "--out", tmp_path / "c.zarr", "--wordings", "pusht_language", "--instruction", "the centre")
    with pytest.raises(ValueError, match=r"--wordings must be one of .*got 'pusht'.*Did you mean 'pusht_language'"):
        run("merge", store, "--out", tmp_path / "c.zarr", "--wordings", "pusht", "--instruction", "x")


def test_merge_with_wordings_and_no_instruction_says_what_is_missing(tmp_path):
    store = make_v2_store(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="--wordings pusht_language needs one --instruction for each source"):
        run("merge", store, "--out", tmp_path / "c.zarr", "--wordings", "pusht_language")


def test_merge_paints_out_only_what_it_knows(tmp_path):
    store = make_v2_store(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="Did you mean 'pusht_goal'"):
        run("merge", store, "--out", tmp_path / "b.zarr", "--paint-out", "pusht")
    with pytest.raises(ValueError, match="no light green goal in img"):
        run("merge", store, "--out", tmp_path / "b.zarr", "--paint-out", "pusht_goal")


def test_episodes_are_written_as_numbers_and_ranges():
    assert parse_episodes("3, 7-9,8") == [3, 7, 8, 9]


@pytest.mark.parametrize("text", ["", "a", "3,", "-1", "3-", "1-2-3", "9-7"])
def test_episodes_that_cannot_be_read_are_refused_with_the_text(text):
    with pytest.raises(ValueError, match=r"must (read like|go up)"):
        parse_episodes(text)


@pytest.mark.parametrize("command", ["info", "validate", "drop", "convert", "merge"])
def test_every_help_teaches_with_an_example(command):
    code, output = run(command, "--help")
    assert code == 0 and f"Example: diffpolicy data {command}" in output
