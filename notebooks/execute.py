"""Run the notebooks from the first cell to the last and keep their outputs: `python notebooks/execute.py [FILE ...]`.

What is kept is the same for everyone: no times, no versions of the machine, nothing that a run writes. Cells with the
tag `install` are not run: what they install is there.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
# What bitsandbytes says at its import on some CPUs. The notebooks do not need it, but who tests this project has it.
NOISE = re.compile(r"Failed to load CPU gemm_4bit_forward from kernels-community.*\n")


def execute(file: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in a new process; the file itself is left as it is.

    Args:
        file: The notebook.
        folder: Where it runs, with a copy of the modules that lie beside the notebook; it writes there.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    for module in HERE.glob("*.py"):
        shutil.copy(module, folder)
    notebook = nbformat.read(file, as_version=4)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        skip_cells_with_tag="install",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    return tidy(notebook)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from machine to machine and tells nothing."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            for output in cell.outputs:
                if "text" in output:
                    output.text = NOISE.sub("", output.text)
            cell.outputs = [output for output in cell.outputs if output.get("text") != ""]
    return notebook


def main(arguments: list[str]) -> None:
    """Execute the notebooks that are named, or all."""
    with tempfile.TemporaryDirectory() as folder:
        for file in [Path(argument) for argument in arguments] or sorted(HERE.glob("*.ipynb")):
            notebook = execute(file, Path(folder))
            nbformat.validate(notebook)
            nbformat.write(notebook, file)


if __name__ == "__main__":
    main(sys.argv[1:])
