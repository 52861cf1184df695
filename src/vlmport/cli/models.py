"""`vlmport models`."""

from __future__ import annotations

from vlmport.cli.app import app


@app.command()
def models() -> None:
    """List the built-in models and the supported families."""
    from vlmport.builtin import DESCRIPTIONS
    from vlmport.families import FAMILIES

    for name, text in DESCRIPTIONS.items():
        print(f"{name}\tbuilt in: {text}")
    for family in FAMILIES:
        print(f"{family.name}\tfamily: checkpoints of model_type {', '.join(family.model_types)}")
