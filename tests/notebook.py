"""Run a notebook of examples/ and compare what it prints, or write its new outputs.

python -m tests.notebook examples/shapes.ipynb            # exit 1 where a text differs
python -m tests.notebook examples/shapes.ipynb --write
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> Any:
    """The notebook with the outputs that its cells have now. The file is left alone."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # stderr has warnings of this machine's packages
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    return notebook


def texts(notebook: Any) -> list[str]:
    """The text that each code cell prints or returns; no images."""
    return [
        "".join(
            output.get("text") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
            if "image/png" not in output.get("data", {})
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    done = run(arguments.notebook)
    if arguments.write:
        nbformat.write(done, arguments.notebook)
        return
    stored = texts(nbformat.read(arguments.notebook, as_version=4))
    for number, (old, new) in enumerate(zip(stored, texts(done), strict=True), 1):
        if old != new:
            sys.exit(f"code cell {number} prints\n{new}\nthe notebook holds\n{old}")


if __name__ == "__main__":
    main()
