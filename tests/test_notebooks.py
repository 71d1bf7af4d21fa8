"""Every notebook runs from the first cell to the last, and shows the shapes that the diagram promises."""

from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@cache
def run(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_defines_no_functions(path):
    notebook = run(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(line.startswith(("def ", "class ")) for source in code for line in source.splitlines())


def test_the_data_flow_notebook_shows_the_shapes_of_the_diagram():
    notebook = run(Path(__file__).parent.parent / "notebooks" / "01_data_flow.ipynb")
    printed = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output and "text/plain" in output["data"]
    ]
    assert any("'actions': (4, 16, 2)" in text for text in printed)  # (B, T_pred, D_act)
    assert any("(1, 2, 2)" in text or "(4, 2, 2)" in text for text in printed)  # (B, T_obs, 2)
    assert any("(1, 40, 16, 2)" in text for text in printed)  # samples of one observation
    assert any("(1, 8, 2)" in text for text in printed)  # executed (B, T_act, D_act)
