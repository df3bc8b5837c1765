"""What `import flexigpt` gives, and what it waits for."""

import subprocess
import sys

import flexigpt


def test_dir_is_the_api() -> None:
    assert dir(flexigpt) == sorted([*flexigpt.__all__, "__all__", "__version__"])
    assert {"PruneOptions", "prune", "recover", "evaluate", "write_checkpoint", "InputError"} < set(flexigpt.__all__)
    for name in flexigpt.__all__:
        assert name == "PRESETS" or getattr(flexigpt, name).__module__.startswith("flexigpt.")


def test_a_function_stays_one_when_its_rooms_are_loaded() -> None:
    """`report` is a room and a function; the rooms `pruning` and `recovery` have files called as their functions."""
    code = (
        "import flexigpt.report.page, flexigpt.pruning.prune, flexigpt\n"
        "from flexigpt.pruning import prune\n"
        "print(callable(flexigpt.report), callable(flexigpt.prune), callable(prune))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True True True\n"


def test_importing_waits_for_no_library() -> None:
    code = "import sys, flexigpt\nprint(sorted({'torch', 'transformers', 'typer', 'rich'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
