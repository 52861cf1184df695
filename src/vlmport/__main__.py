"""`python -m vlmport`, and the console script. It handles signals during imports too."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from vlmport import signals

    signals.end_at_once()
    from vlmport.cli import main

    main()


if __name__ == "__main__":
    main()
