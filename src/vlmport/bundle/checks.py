"""Find contradictions in a manifest."""

from __future__ import annotations

from vlmport.bundle.hashing import CHUNK_BYTES
from vlmport.bundle.layouts import LAYOUTS
from vlmport.bundle.manifest import Manifest
from vlmport.bundle.precisions import ANY


def contradictions(manifest: Manifest) -> list[str]:
    """What a schema can't say: the layout's components are there, named files are listed, auto
    choices exist, lengths agree."""
    absent = [
        name for name in LAYOUTS[manifest.layout].components if name not in manifest.components
    ]
    problems = [f"layout {manifest.layout}: no component {name}" for name in absent]
    for component, forms in manifest.components.items():
        for variant in forms.values():
            named = [variant.model, *variant.data]
            unlisted = [name for name in named if name not in manifest.files]
            problems += [f"{component}: {name} is not in files" for name in unlisted]
    for device, choice in manifest.auto.items():
        for component, precision in choice.items():
            forms = manifest.components.get(component, {})
            if precision not in forms and ANY not in forms:
                problems.append(f"auto.{device}: no {component} in {precision}")
        open_choices = [
            component
            for component, forms in manifest.components.items()
            if component not in choice and ANY not in forms
        ]
        problems += [f"auto.{device}: no choice for {component}" for component in open_choices]
    return problems + _wrong_lengths(manifest)


def _wrong_lengths(manifest: Manifest) -> list[str]:
    """Find lists whose lengths disagree with each other, or with a number next to them."""
    problems = []
    for name, entry in manifest.files.items():
        expected = -(-entry.size // CHUNK_BYTES)
        if len(entry.chunks) != expected:
            problems.append(f"{name}: {len(entry.chunks)} chunk hashes, expected {expected}")
    for precision, one in manifest.golden.expected.items():
        where = f"golden.expected.{precision}"
        if len(one.logits) != len(one.logit_ids):
            problems.append(f"{where}: {len(one.logits)} logits for {len(one.logit_ids)} ids")
        if max(one.logit_ids) >= manifest.dims.vocab_size:
            problems.append(f"{where}: logit id {max(one.logit_ids)} is not in the vocabulary")
        needed = manifest.golden.prefill_tokens + len(one.tokens) - 1
        if needed > manifest.dims.context_length:
            problems.append(
                f"{where}: takes {needed} positions, the context is {manifest.dims.context_length}"
            )
    return problems
