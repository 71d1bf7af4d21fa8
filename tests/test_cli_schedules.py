"""`diffpolicy schedules`: the table tells what a schedule leaves, the file holds every step, the picture is drawn."""

import csv
import re

import pytest
from PIL import Image

from diffpolicy import cli
from diffpolicy.processes import SCHEDULES, SPACINGS
from diffpolicy.processes.description import describe_schedule
from diffpolicy.processes.diffusion import DiffusionConfig


def run(arguments: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["diffpolicy", "schedules", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def row(table: str, name: str) -> str:
    return next(line for line in table.splitlines() if re.match(rf"│ {re.escape(name)} +│", line))


def test_all_schedules_are_listed_and_those_that_leave_signal_are_marked(tmp_path, monkeypatch, capsys):
    code, out, _ = run(["--out", str(tmp_path / "s.png")], monkeypatch, capsys)
    assert code == 0 and all(row(out, name) for name in SCHEDULES)
    assert "60.3%" in row(out, "linear") and "terminal signal 60%" in row(out, "linear")
    assert "terminal" not in row(out, "cosine")
    assert Image.open(tmp_path / "s.png").width > 1000


def test_rescaled_schedules_are_rows_of_their_own(tmp_path, monkeypatch, capsys):
    _, out, _ = run(["linear", "--terminal-snr", "all", "--out", str(tmp_path / "s.pdf")], monkeypatch, capsys)
    assert "0.5%" in row(out, "linear, scaled") and "zero SNR with epsilon" in row(out, "linear, zero")
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF")


def test_leading_is_marked_as_starting_late_and_trailing_is_not(tmp_path, monkeypatch, capsys):
    _, out, _ = run(["cosine", "--steps", "4", "--out", str(tmp_path / "s.png")], monkeypatch, capsys)
    assert "75 50 25 0" in row(out, "leading") and "starts at t=0.76" in row(out, "leading")
    assert "99 74 49 24" in row(out, "trailing") and "starts" not in row(out, "trailing")


def test_table_file_is_shown_and_every_step_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.csv").write_text("t,alpha_bar\n0,1\n0.5,0.5\n1,0.01\n")
    arguments = ["--file", str(tmp_path / "mine.csv"), "-T", "4", "--steps", "2"]
    _, out, _ = run(
        [*arguments, "--csv", str(tmp_path / "o.csv"), "--out", str(tmp_path / "s.png")], monkeypatch, capsys
    )
    assert "10.0%" in row(out, "table")
    with open(tmp_path / "o.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["t"], float(r["alpha_bar"])) for r in rows] == [
        ("0.25", 0.75),
        ("0.5", 0.5),
        ("0.75", 0.255),
        ("1.0", 0.01),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cosin"], "schedule must be one of .* Did you mean 'cosine'"),
        (["--terminal-snr", "zer"], "process.terminal_snr must be one of .* Did you mean 'zero'"),
        (["--prediction", "eps"], "process.prediction_type must be one of .* got 'eps'"),
        (["--out", "x.jpg"], "--out must end in .png or .pdf, got x.jpg"),
        (["--file", "none.csv"], "process.schedule_file=none.csv does not exist"),
        (["--steps", "101"], r"num_inference_steps must be in \[1, process.num_train_timesteps = 100\]"),
        (["--shift", "0"], "process.shift must be positive"),
    ],
)
def test_slip_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(arguments, monkeypatch, capsys)
    if arguments[0] == "--steps":  # a spacing that cannot says so in its row, the others are shown
        assert code == 0 and re.search(said, " ".join(out.replace("│", " ").split()))
    else:
        assert code == 2 and len(err.strip().splitlines()) == 1 and re.search(said, err)


def test_description_counts_steps_by_log_snr():
    d = describe_schedule(DiffusionConfig(schedule="cosine"), 10)
    assert sum(d.band_shares) == pytest.approx(1) and d.findings == () and set(d.visited) == set(SPACINGS)
    assert d.log_snr[0] > 7 and d.log_snr[-1] < -15 and len(d.alpha_bar) == 100
