"""Write the model card: the origin of a bundle, its contents, its use, its measurements.

Later measurements go between marks: `<!-- parity -->` (`vlmport verify`) and `<!-- accuracy -->`
(`vlmport eval`), see `vlmport.bundle.recording`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from vlmport.checkpoint import Checkpoint
from vlmport.checkpoint.model_card import read_card
from vlmport.families.base import HubFiles

MOST_NAMES, LONGEST_NAME = 10, 200
CAPTION = ({"role": "user", "content": [{"type": "image"}]},)


def write_card(
    checkpoint: Checkpoint,
    hub: HubFiles,
    folder: Path,
    *,
    name: str,
    forms: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]] = CAPTION,
    runs: bool = True,
    ignored: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write README.md; the same checkpoint gives the same bytes.

    Licence and language are those of the source's own card, if it names them. The base model is the
    source itself if it is on the Hub, else that of the source's card.

    Args:
        forms: precision → one line that describes it, with its size.
        messages: the messages that ask for a caption of one image.
        runs: whether the vlmport runtimes and transformers.js run this layout.
        ignored: pattern → the tensors of the checkpoint that it left out.
    """
    source = read_card(checkpoint.folder)
    hub_id, commit = _on_the_hub(checkpoint.folder)
    base = hub_id or source.get("base_model")
    licence = _listed(source.get("license_name") or source.get("license"))
    made_from = f"the checkpoint {_code(name)}"
    if hub_id:
        made_from = f"{_code(hub_id)}, commit {_code(str(commit))}"
    body = CARD.format(
        name=_plain(name),
        what=hub.description,
        made_from=made_from,
        base=_listed(base) or "not named by its source",
        licence=licence or "not named by its source: ask there before you use it",
        ignored="".join(
            f"| left out | {len(names)} tensors of the checkpoint that match {_code(pattern)} |\n"
            for pattern, names in (ignored or {}).items()
        ),
        rows="\n".join(f"| `{precision}` | {text} |" for precision, text in forms.items()),
        use=_use(next(iter(forms)), messages, hub) if runs else OTHER_USE,
    )
    data = _metadata(source, base, hub, runs=runs)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _metadata(source: Mapping[str, Any], base: Any, hub: HubFiles, *, runs: bool) -> ModelCardData:
    """Make the card's YAML from that of the source's card."""
    return ModelCardData(
        library_name="transformers.js" if runs else None,
        base_model=base,
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=source.get("license_link"),
        language=source.get("language"),
        pipeline_tag=hub.pipeline_tag,
        tags=["onnx", "vlmport"],
    )


def _use(precision: str, messages: Sequence[Mapping[str, Any]], hub: HubFiles) -> str:
    """Write the section that shows how to run the bundle."""
    return USE.format(
        precision=precision,
        messages=json.dumps(list(messages), ensure_ascii=False),
        inputs="image, prompt" if hub.image_before_text else "prompt, image",
    )


def _on_the_hub(folder: Path) -> tuple[str, str] | tuple[None, None]:
    """Read id and commit from a folder in the Hub's cache: models--org--name/snapshots/commit."""
    repo = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repo.startswith("models--"):
        return None, None
    return repo.removeprefix("models--").replace("--", "/"), folder.name


def _listed(names: Any) -> str:
    """Write one name or several as code; empty for none."""
    given = [names] if isinstance(names, str) else names
    given = given if isinstance(given, list) else []
    return ", ".join(_code(name) for name in given[:MOST_NAMES] if isinstance(name, str))


def _code(text: str) -> str:
    """Write a name from outside as code in a table: nothing in it is Markdown, HTML or a mark."""
    return f"`{_one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _plain(text: str) -> str:
    """Write a name from outside in a title."""
    return re.sub(r"([\\`*\[\]<>|&!])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    """Remove control characters and marks of comments, and cut the text to LONGEST_NAME."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(shown.replace("<!--", "<! --").split())[:LONGEST_NAME]


CARD = """\
# {name}

ONNX export of {what}, written by vlmport. It runs without PyTorch: preprocessing, vision tower and
decoder are graphs, and `vlmport.json` tells a program all that it needs to run them, with the size
and SHA-256 of every file.

| | |
| --- | --- |
| made from | {made_from} |
| base model | {base} |
| licence | {licence} |
{ignored}
## Precisions

| precision | what it is, and what it takes to download |
| --- | --- |
{rows}

{use}
## Parity with PyTorch

<!-- parity -->
Not verified yet: `vlmport verify . --reference CHECKPOINT` writes the table here.
<!-- /parity -->

## Limits

An export changes the form of a model and not what it learnt: what its makers say of intended use,
bias and training data holds here too. What was not measured on this page is not claimed.
"""

USE = """\
## Use

`MODEL` stands for this repository's id on the Hub, or for this folder.

On the command line and from Python, with vlmport installed:

```sh
vlmport caption photo.jpg --model MODEL
```

```python
import vlmport

with vlmport.load("MODEL", precision="{precision}") as model:
    print(model.caption("photo.jpg"))
```

In a web page, on WebGPU or WebAssembly, with `@vlmport/web`:

```js
import {{ VLM }} from '@vlmport/web';

const model = await VLM.load('https://example.org/MODEL/');
console.log((await model.caption(file)).text);
```

With transformers.js. It resizes pictures by itself, so a caption may differ from what was measured
here:

```js
import {{ AutoModelForImageTextToText, AutoProcessor, RawImage }} from '@huggingface/transformers';

const dtype = '{precision}';
const model = await AutoModelForImageTextToText.from_pretrained('MODEL', {{ dtype }});
const processor = await AutoProcessor.from_pretrained('MODEL');

const messages = {messages};
const prompt = processor.apply_chat_template(messages, {{ add_generation_prompt: true }});
const image = await RawImage.read('photo.jpg');
const inputs = await processor({inputs});
const output = await model.generate(inputs);
const ids = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(ids, {{ skip_special_tokens: true }})[0]);
```

## Accuracy

<!-- accuracy -->
Not measured yet: `vlmport eval . PICTURES` writes the table here.
<!-- /accuracy -->
"""

OTHER_USE = """\
## Use

This layout is for programs of your own: `vlmport.json` names the graphs, and `vlmport inspect .`
prints their inputs and outputs.
"""
