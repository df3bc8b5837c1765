"""The command line: arguments in, a command run, one line for what went wrong."""

import contextlib
import errno
import logging
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NoReturn

import typer

import flexigpt
from flexigpt.cli.commands import add_commands
from flexigpt.cli.console import Verbosity
from flexigpt.cli.help import Group
from flexigpt.cli.options import Call
from flexigpt.runtime import InputError, launched_rank, on_signals, one_line

_INTERRUPTED = 130  # what typer returns after KeyboardInterrupt
_UNHEARD = 141  # of who writes to a closed pipe: 128 and the number of the signal
# Heard before and after the command's name.
_VERBOSITY = {
    "-q": Verbosity.QUIET,
    "--quiet": Verbosity.QUIET,
    "-v": Verbosity.VERBOSE,
    "--verbose": Verbosity.VERBOSE,
}
# A full disk.
_LOST_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_LIBRARIES = (
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "torch.utils._pytree",
    "torchao",
    "transformers",
)


def _print_version(context: typer.Context, asked: bool) -> None:
    if asked:
        print(f"flexigpt {flexigpt.__version__}")
        if context.obj.verbosity is Verbosity.VERBOSE:
            from flexigpt.runtime import machine_lines  # noqa: PLC0415 - it loads torch

            print("\n".join(machine_lines()))
        raise typer.Exit


def root(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print what libraries say, too.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version; with -v the machine."
        ),
    ] = False,
) -> None:
    """Smaller large language models: units that a text needs least go, or blocks are shared."""


def _make_app() -> typer.Typer:
    settings = {"help_option_names": ["-h", "--help"]}
    made = typer.Typer(
        name="flexigpt",
        cls=Group,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=settings,
    )
    made.callback()(root)
    add_commands(made)
    return made


app = _make_app()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Bad input and interruption: one line on standard error and exit code 2; faults of ours: 1.

    Where nobody reads any more, as after `head`, it ends without a word: 141.
    """
    try:
        _run(arguments)
    except (BrokenPipeError, SystemExit) as error:
        # rich and typer make exit code 1 of it.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _forget(sys.stdout, sys.stderr)
        sys.exit(_UNHEARD)


def _run(arguments: Sequence[str] | None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = given[: given.index("--")] if "--" in given else given
    verbosity = next((_VERBOSITY[word] for word in reversed(words) if word in _VERBOSITY), Verbosity.NORMAL)
    rest = [word for word in words if word not in _VERBOSITY] + given[len(words) :]
    call = Call(shlex.join(["flexigpt", *given]), verbosity)
    heard: list[bool] = []

    def interrupt() -> None:
        heard.append(True)
        raise KeyboardInterrupt

    # Where Ctrl-C is to be ignored, as behind nohup, it is.
    numbers = [signal.SIGTERM, *([signal.SIGINT] if callable(signal.getsignal(signal.SIGINT)) else [])]
    # typer brings its own copy of click or depends on it, by version; either way this is its base of usage errors.
    usage_error: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    try:
        # Surrogates are how Python hands on bytes that are not UTF-8; neither records nor hubs can hold them.
        if strange := [word for word in given if re.search("[\ud800-\udfff]", word)]:
            raise InputError(f"{strange[0]!a} is not valid UTF-8: rename the file, or type it again")
        with on_signals(interrupt, *numbers), _libraries_speak(verbosity):
            code = app(rest, standalone_mode=False, obj=call, prog_name="flexigpt")
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except InputError as error:
        _fail(str(error))
    except usage_error as error:
        _fail(error.format_message())
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        _fail("interrupted: nothing was written")
    except Exception as error:
        if heard:  # torch makes an error of its own of what is raised while it converts a value
            _fail("interrupted: nothing was written")
        _blame(error, verbosity)


def _blame(error: Exception, verbosity: Verbosity) -> NoReturn:
    """Ends with what the machine lacks, or else with a fault of flexigpt's own."""
    # Of stdout: files have messages of their own.
    if isinstance(error, OSError) and error.filename is None and error.errno in _LOST_OUTPUT:
        _forget(sys.stdout)
        _fail(f"the output cannot be printed: {error.strerror}")
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        _fail("memory does not suffice: free some, or give a smaller model, shorter windows or fewer at a time")
    if verbosity is Verbosity.VERBOSE:
        traceback.print_exception(error)
    what = f"{type(error).__name__}: {one_line(error)}"
    print(f"flexigpt: {what}. This is a fault of flexigpt, please report it (-v shows where it is)", file=sys.stderr)
    sys.exit(1)


def _forget(*streams: Any) -> None:
    """Lets streams lead nowhere, or Python would flush into them once more."""
    for stream in filter(None, streams):  # one may be closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _libraries_speak(verbosity: Verbosity) -> Iterator[None]:
    """Within it other libraries say nothing but errors, or as much as they like."""
    if verbosity is Verbosity.VERBOSE:
        yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it raises its errors as well
    for library in ("TRANSFORMERS", "HF_HUB"):  # a level set before they are loaded would be lost
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if "transformers" in sys.modules:  # loaded before those variables were set
        from transformers.utils import logging as of_transformers  # noqa: PLC0415

        of_transformers.set_verbosity_error()
        of_transformers.disable_progress_bar()
    for library in _LIBRARIES:
        logging.getLogger(library).setLevel(logging.CRITICAL if library == "datasets" else logging.ERROR)
    with warnings.catch_warnings():
        yield


def _fail(message: str) -> None:
    if message and launched_rank() == 0:  # a bare `flexigpt` has printed its help, and that is all
        print(f"flexigpt: {' '.join(message.splitlines())}", file=sys.stderr)  # a name may hold what ends a line
    sys.exit(2)
