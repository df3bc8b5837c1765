"""Pruning or plain removal with the settings that Python alone has, too: NAME=VALUE for each field of PruneOptions.

python benchmarks/prune.py examples/novel16 out/scaled preset=paper ratio=0.3 base_scale=true
"""

import json
import sys
from typing import Any

from flexigpt import PruneOptions, assemble_pruned, assemble_removed, write_checkpoint


def value_of(text: str) -> Any:
    """true, 24 and 0.3 as JSON has them, all else as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(source: str, out: str, *settings: str) -> None:
    given = {name: value_of(text) for name, _, text in (setting.partition("=") for setting in settings)}
    options: PruneOptions = getattr(PruneOptions, given.pop("preset", "fitted"))(**given)
    if options.remove:
        assembly, _, record = assemble_removed(source, options)
        write_checkpoint(out, assembly, record, source=source)
    else:
        with assemble_pruned(source, options) as (assembly, _, record):
            write_checkpoint(out, assembly, record, source=source)


if __name__ == "__main__":
    main(*sys.argv[1:])
