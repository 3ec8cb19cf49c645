"""demo.ipynb: runs from top to bottom with a model that it trains, and with any other; kept without text of a run.

After a change of the notebook, python tests/test_notebook.py runs it and keeps its pictures, where the demo has been
trained.
"""

import base64
import copy
import io
from pathlib import Path

import nbclient
import nbformat
from conftest import ENVIRONMENT, TINY_XS
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "demo.ipynb"
LARGEST = 200_000  # bytes of all its pictures
PICTURES = 6  # samples, guidance, progress, directions, two of another size


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def with_parameters(cells: list, source: str) -> list:
    """A copy of the cells, with source after the cell of parameters, as papermill puts it."""
    cells = copy.deepcopy(cells)
    place = next(k for k, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    return [*cells[: place + 1], nbformat.v4.new_code_cell(source), *cells[place + 1 :]]


def executed(cells: list) -> list:
    """The cells with what they put out, by a kernel of this Python on one thread of the CPU."""
    notebook = read()
    notebook.cells = cells
    place = {"metadata": {"path": ROOT}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place)
    client.execute(env=ENVIRONMENT)
    return notebook.cells


def pictures(cells: list) -> list:
    """Outputs that are pictures."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def printed(cells: list) -> str:
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_the_notebook_runs_with_a_model_that_it_trains_and_with_others(run, whole, tmp_path):
    cells = read().cells
    fewer = "lambda size: tuple(part[:40] for part in all_digits(size))"
    small = [
        f"import models; models.SIZES['XS'].update({TINY_XS})",
        f"from demo import digits; all_digits = digits.enlarged_digits; digits.enlarged_digits = {fewer}",
        f"RESULTS = {str(tmp_path)!r}; STEPS = 2",
    ]
    parameters = ["\n".join(small), f"CKPT = {str(run)!r}", f"CKPT = {str(whole)!r}"]
    passes = [with_parameters(cells, source) for source in parameters]
    done, length = executed(sum(passes, [])), len(passes[0])  # in one kernel, since it takes seconds to start
    trained, spiral, sincos = (done[first : first + length] for first in range(0, len(done), length))
    assert (tmp_path / "notebook" / "run" / "finished.json").exists()
    assert "DiT-XS/2, (64, 64) pixels, 10 classes" in printed(trained)
    assert "DiT-XS/2, (32, 32) pixels, 3 classes" in printed(spiral)
    assert len(pictures(trained)) == len(pictures(spiral)) == PICTURES
    assert "sin-cos positions, which are added to the tokens" in printed(sincos) and len(pictures(sincos)) == 3


def test_the_notebook_is_kept_with_its_pictures_alone():
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None for cell in code)
    kept = pictures(code)
    assert len(kept) == PICTURES == sum(len(cell.outputs) for cell in code)
    assert all(output.data.keys() == {"image/png"} and not output.metadata for output in kept)
    assert sum(len(base64.b64decode(output.data["image/png"])) for output in kept) < LARGEST


def smaller(picture: str) -> str:
    """A PNG, as notebooks hold it, with 32 colours."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        image.convert("RGB").quantize(32).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def keep() -> None:
    """Run the notebook as it is, and write it with its pictures alone."""
    notebook = read()
    notebook.cells = executed(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, pictures([cell])
            cell.metadata.pop("execution", None)
            for output in cell.outputs:
                output.data, output.metadata = {"image/png": smaller(output.data["image/png"])}, {}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    keep()
