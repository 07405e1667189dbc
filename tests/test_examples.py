"""The notebook in examples/ does what it says, word for word but for the number of training steps."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "whole-job.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, 4)
    setup = notebook.cells[1]
    assert "STEPS = 4000" in setup.source
    setup.source = setup.source.replace("STEPS = 4000", "STEPS = 20")
    folder = tmp_path_factory.mktemp("notebook")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, folder / "notebook-out"


def outputs(notebook, kind):
    cells = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [each["data"][kind] for each in cells if kind in each.get("data", {})]


def test_notebook_is_kept_without_outputs():
    assert not any(cell.get("outputs") for cell in nbformat.read(NOTEBOOK, 4).cells)


def test_notebook_does_the_whole_job(executed):
    notebook, folder = executed
    assert [path.name for path in sorted(folder.iterdir())] == ["model.keyed", "model.onnx", "owner.pem"]
    said = "\n".join(outputs(notebook, "text/plain"))
    assert "'answer': 'not protected'" in said  # by 20 steps
    assert "% of predictions are as before" in said
    assert "'Trouser'" in said
    assert len(outputs(notebook, "image/png")) == 1


def test_notebook_says_what_it_will_do_and_tests_both_networks(executed):
    notebook, _ = executed
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )
    assert "Up to 20 steps of 16 + 16" in "".join(outputs(notebook, "text/plain"))
    assert "the protected network: Not shown" in printed
    assert "the network before: Not shown" in printed
