"""`python -m vlmport`, and the console script. A signal while modules are imported is heard too."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from vlmport import signals

    signals.end_at_once()
    from vlmport.cli import main

    main()


if __name__ == "__main__":
    main()
