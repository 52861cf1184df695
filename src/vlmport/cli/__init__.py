"""The command line: one module for each command, which calls the Python function of its name.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done; 1 a check failed
(`verify`, `eval`, `inspect --probe`), or the reader of the output has ended; 2 bad input;
130 Ctrl-C; 143 SIGTERM; 129 SIGHUP.
"""

from __future__ import annotations

# Commands are listed by --help in the order of their import.
from vlmport.cli import caption as caption  # isort: skip
from vlmport.cli import ask as ask  # isort: skip
from vlmport.cli import chat as chat  # isort: skip
from vlmport.cli import export as export  # isort: skip
from vlmport.cli import verify as verify  # isort: skip
from vlmport.cli import eval as eval  # isort: skip
from vlmport.cli import bench as bench  # isort: skip
from vlmport.cli import tune as tune  # isort: skip
from vlmport.cli import inspect as inspect  # isort: skip
from vlmport.cli import demo as demo  # isort: skip
from vlmport.cli import serve as serve  # isort: skip
from vlmport.cli import page as page  # isort: skip
from vlmport.cli import models as models  # isort: skip
from vlmport.cli.app import app as app
from vlmport.cli.process import run_app as run_app


def main() -> None:
    """Run the console script."""
    run_app()
