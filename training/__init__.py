"""Recipes that train the checkpoints shipped inside the package; not part of the wheel."""
