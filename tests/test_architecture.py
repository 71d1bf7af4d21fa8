"""The house: imports run one way, heavy packages stay in their rooms, and importing the front door loads none of them."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffpolicy
from diffpolicy.config import find_yaml, shipped_conf

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "diffpolicy"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS: list[set[str]] = [
    {"spec"},
    {"store_folder", "store_layout", "normalizer", "safety", "metrics", "ablation_cells", "plots", "progress", "envs"},
    {"replay", "ablation_table"},
    {"importers", "rewriting", "windows", "validation", "open_loop", "ablation_axes", "embedding_store"},
    {"merging", "ablation_plots", "paint_out"},
    {"encoders", "denoisers", "processes", "guidance"},
    {"policies", "foreign", "mixture", "schedule_plots"},
    {"executors"},
    {"rollout", "demos", "oracle", "ablation_report"},
    {"training", "probes", "diversity"},
    {"probe_table"},
    {"probe_report"},
    {"config"},
    {"sweep"},
    {"checkpoint"},
    {"embed"},
    {"prepare"},
    {"train", "bench", "evaluate"},
    {"quickstart", "cli_data", "cli_oracle", "cli_schedules", "workers", "ablation_jobs"},
    {"ablation_plan"},
    {"ablation_folder"},
    {"ablate"},
    {"cli_ablate"},
    {"cli"},
]
"""A module or folder may import from the layers above its own in this list, and from itself; nothing else."""
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}

ROOMS = {
    "zarr": {"replay", "importers", "validation", "embedding_store"},
    "open_clip": {"encoders/clip_towers", "encoders/clip_weights"},
    "peft": {"encoders/lora"},
    "diffusers": {"processes"},
    "lightning": {"training", "train"},
    "omegaconf": set().union(*LAYERS[HEIGHT["config"] :]),
    "safetensors": {"checkpoint"},
    "gymnasium": {"envs"},
    "metaworld": {"envs"},
    "mujoco": {"envs"},
    "typer": {"cli", "cli_data", "cli_schedules", "cli_ablate", "cli_oracle"},
}
"""Third-party package -> the only modules or folders that may import it."""
HEAVY = ("torch", "lightning", "zarr", "diffusers", "omegaconf", "open_clip", "numpy", "gymnasium", "matplotlib")


def room(file: Path) -> str:
    """The module or folder of the package that a file belongs to: `replay`, `processes`, ..."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            # `from diffpolicy import plots` means diffpolicy.plots
            names = (
                [f"diffpolicy.{alias.name}" for alias in node.names] if node.module == "diffpolicy" else [node.module]
            )
            yield from ((node.lineno, name) for name in names)


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after running the code."""
    report = f"\nimport sys; print('loaded:', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("loaded:").split())


def test_heavy_packages_are_noticed():
    assert loaded_by("print('hello'); import numpy") == {"numpy"}


def test_every_module_has_its_place_in_the_order():
    unplaced = {room(file) for file in FILES} - set(HEIGHT) - {"__init__"}
    assert unplaced == set(), "give each its place in LAYERS"


def test_imports_run_one_way():
    wrong = []
    for file in FILES:
        here = room(file)
        for line, name in imported(file):
            parts = name.split(".")
            if parts[0] != "diffpolicy" or len(parts) == 1 or parts[1] in (here, "__version__"):
                continue
            if here == "__init__" or HEIGHT[parts[1]] >= HEIGHT[here]:
                wrong.append(f"{file.relative_to(PROJECT)}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("package", ROOMS)
def test_third_party_package_is_known_only_in_its_room(package):
    known_in = {
        room(file) if room(file) in ROOMS[package] else file.relative_to(PACKAGE).with_suffix("").as_posix()
        for file in FILES
        for _, name in imported(file)
        if name.split(".")[0] == package
    }
    assert known_in <= ROOMS[package]


@pytest.mark.parametrize(
    "module", ["diffpolicy", "diffpolicy.spec", "diffpolicy.cli", "diffpolicy.cli_data", "diffpolicy.cli_ablate"]
)
def test_importing_the_front_door_loads_nothing_heavy(module):
    assert loaded_by(f"import {module}") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["data", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["diffpolicy", *{arguments!r}]
from diffpolicy.cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
"""
    assert loaded_by(code) == set()


@pytest.mark.parametrize(
    "module", ["envs", "envs.players", "replay", "rewriting", "metrics", "plots", "validation", "demos"]
)
def test_rooms_that_worker_processes_enter_do_not_load_torch(module):
    assert "torch" not in loaded_by(f"import diffpolicy.{module}")


def test_public_names_are_there():
    for name in diffpolicy.__all__:
        assert getattr(diffpolicy, name) is not None
    assert set(diffpolicy.__all__) <= set(dir(diffpolicy))
    with pytest.raises(AttributeError, match="has no attribute 'Horizon'"):
        _ = diffpolicy.Horizon


def test_no_module_is_a_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "manager", "core"}
    names = {part.removesuffix(".py") for file in FILES for part in file.relative_to(PACKAGE).parts}
    assert names & drawers == set()


def test_every_module_says_what_it_is():
    assert [str(file) for file in FILES if not ast.get_docstring(ast.parse(file.read_text()))] == []


def test_wheel_carries_every_config_to_where_it_is_looked_for():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried["conf"] == "diffpolicy/conf"
    shipped = sorted((PROJECT / "conf").rglob("*.yaml"))
    assert shipped and shipped_conf() == PROJECT / "conf"
    assert [p for p in (PROJECT / "conf").rglob("*") if p.is_file() and p.suffix != ".yaml"] == []
    for file in shipped:
        assert find_yaml(file.relative_to(PROJECT)).samefile(file)


def test_command_starts_where_pyproject_says():
    from diffpolicy import cli

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["diffpolicy"].partition(":")
    assert module == cli.__name__ and callable(getattr(cli, function))
    assert project["project"]["version"] == diffpolicy.__version__


def test_git_ignores_data_but_no_part_of_the_project():
    if not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    asked = [str(f.relative_to(PROJECT)) for f in FILES] + [
        "data/README.md",
        "data/demos.zarr/zarr.json",
        "diffpolicy/data/x.py",
    ]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *asked], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["data/demos.zarr/zarr.json"]
