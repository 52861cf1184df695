"""Export your fine-tune, prove the bundle right, and caption an image with it.

    python export_and_verify.py my-finetune my-bundle photo.jpg
    python export_and_verify.py base-model my-bundle photo.jpg --adapter my-lora

`verify` needs PyTorch: `pip install 'vlmport[verify]'`. Exits with 1 if a check failed.
"""

import argparse
import sys

import vlmport


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("out", help="folder of the bundle; must not exist")
    parser.add_argument("image")
    parser.add_argument("--adapter", help="PEFT folder or Hub id")
    parser.add_argument("--precisions", default="fp32,q8")
    arguments = parser.parse_args()
    try:
        return run(arguments)
    except vlmport.VlmportError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code


def run(arguments):
    precisions = arguments.precisions.split(",")
    vlmport.export(
        arguments.checkpoint, arguments.out, precisions=precisions, adapter=arguments.adapter
    )
    report = vlmport.verify(arguments.out, arguments.checkpoint, adapter=arguments.adapter)
    if not report.passed:
        print(f"broken: {report.first_broken}", file=sys.stderr)
        print(f"likely cause: {report.likely_cause}", file=sys.stderr)
        return 1
    print("verified")
    with vlmport.load(arguments.out) as model:
        print(model.caption(arguments.image))
    return 0


if __name__ == "__main__":
    sys.exit(main())
