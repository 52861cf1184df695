"""Names of precisions, the Hub's suffixes for them, and the choice among those of a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlmport.errors import BundleError, did_you_mean, quoted

ANY = "any"  # the precision of a component that has only one form
AUTO = "auto"

# Precision → the Hub's file suffix.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}

# The default of an export: `auto` finds a choice for each device among them.
DEFAULT_PRECISIONS = ("fp32", "q8", "q4")

# Other common names.
ALIASES = {"int8": "q8"}

# Short names of components in a mixed precision such as 'vision=q4,decoder=fp32'.
SHORT_NAMES = {
    "vision": "vision_encoder",
    "embed": "embed_tokens",
    "decoder": "decoder_model_merged",
}


def canonical(name: str) -> str:
    """Return vlmport's name of a precision; an unknown name is only stripped of blanks."""
    name = name.strip()
    return ALIASES.get(name, name)


def split_precisions(names: str | Iterable[str]) -> tuple[str, ...]:
    """Split 'fp32, int8' or ['fp32', 'int8'] into ('fp32', 'q8'): each once, in the order given.

    Unknown names are kept: the caller reports them with the names that there are.
    """
    given = names.split(",") if isinstance(names, str) else names
    known = (canonical(name) for name in given)
    return tuple(dict.fromkeys(name for name in known if name))


def complete(components: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """List the precisions in which every component exists, in the order of SUFFIXES.

    Args:
        components: component → precision → its files.
    """
    return tuple(
        name
        for name in SUFFIXES
        if all(name in forms or ANY in forms for forms in components.values())
    )


def precision_name(choice: Mapping[str, str]) -> str:
    """Name a choice: one name if all components share it, else 'component=precision,…'."""
    chosen = {name: value for name, value in choice.items() if value != ANY}
    if len(set(chosen.values())) == 1:
        return next(iter(chosen.values()))
    return ",".join(f"{name}={value}" for name, value in chosen.items())


def choose(
    components: Mapping[str, Mapping[str, Any]],
    auto: Mapping[str, Mapping[str, str]],
    precision: str,
    device: str,
) -> dict[str, str]:
    """Map component → precision for a request: 'auto', 'fp32', 'int8', or 'vision=q4,…'.

    Args:
        components: component → precision → its files.
        auto: device → component → what 'auto' means there; 'cpu' serves devices without one.

    Raises BundleError for a precision or component that is not there.
    """
    default = dict.fromkeys(components, ANY) | dict(auto.get(device, auto["cpu"]))
    name = canonical(precision)
    if "=" in name:
        chosen = default | _parse_mix(components, name)
    else:
        chosen = default if name == AUTO else dict.fromkeys(components, name)
    return {component: _check(components, component, chosen[component]) for component in components}


def _parse_mix(components: Mapping[str, Mapping[str, Any]], text: str) -> dict[str, str]:
    mix: dict[str, str] = {}
    for part in text.replace(" ", "").split(","):
        short, _, value = part.partition("=")
        name = SHORT_NAMES.get(short, short)
        if name in mix:
            raise BundleError(
                f"precision {quoted(text)}: {name} is named twice",
                hint="give each component one precision",
                code="precision.unknown",
            )
        mix[name] = canonical(value)
    for name in mix:
        if name not in components:
            raise BundleError(
                f"precision {quoted(text)}: no component {quoted(name)}"
                f"{did_you_mean(name, [*SHORT_NAMES, *components])}",
                hint=f"components of this bundle: {', '.join(components)}",
                code="precision.unknown",
            )
    return mix


def _check(components: Mapping[str, Mapping[str, Any]], component: str, precision: str) -> str:
    forms = components[component]
    if precision in forms:
        return precision
    if ANY in forms:
        return ANY
    # An export replaces the bundle, so what is there has to be named again.
    wanted = [name for name in SUFFIXES if name in (*complete(components), precision)]
    again = f"; to have it too, export again with --precision {','.join(wanted)}"
    raise BundleError(
        f"precision {quoted(precision)} is not in this bundle (component {component})"
        f"{did_you_mean(precision, forms)}",
        hint=f"it holds {', '.join(forms)}{again * (precision in SUFFIXES)}",
        code="precision.not-in-bundle",
    )
