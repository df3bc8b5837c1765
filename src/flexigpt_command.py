"""The `flexigpt` command before its four seconds of imports: Ctrl-C during them is told in one line, too."""

import sys


def main() -> None:
    """Imports the commands and runs one."""
    try:
        from flexigpt.cli import main as run  # noqa: PLC0415 - the reason for this module
    except KeyboardInterrupt:
        print("flexigpt: interrupted: nothing was written", file=sys.stderr)
        sys.exit(2)
    run()
