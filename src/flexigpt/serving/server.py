"""`transformers serve`, which knows the compact model's class."""

import contextlib
import logging
import socket
from collections.abc import Callable

from transformers.utils.import_utils import is_serve_available

from flexigpt.model import FlexiGPTForCausalLM
from flexigpt.runtime import InputError, find_device
from flexigpt.serving.options import ServeOptions
from flexigpt.text import check_tokenizer
from flexigpt.weights import load_tokenizer, open_checked


def serve(model: str, options: ServeOptions, note: Callable[[str], None] = print) -> None:
    """Serves a model with OpenAI's protocol until it is interrupted.

    Args:
        model: folder or hub name of a source or compact model; clients call it the same.
        options: where.
        note: prints a line.

    Raises:
        InputError: packages that are not installed, a model that cannot be opened or whose weights do not fit, a
            place that cannot be listened at.
    """
    if not is_serve_available():
        raise InputError("serving needs more packages: pip install 'flexigpt[serve]'")
    tokenizer, device = load_tokenizer(model), find_device(options.device)
    check_tokenizer(model, tokenizer, open_checked(model).config)
    _check_free(options.host, options.port)
    from transformers.cli.serve import Serve  # noqa: PLC0415 - with a web server behind it
    from transformers.cli.serving import model_manager  # noqa: PLC0415

    # It looks classes up by their names in transformers, which is loaded twice: in its own.
    setattr(vars(model_manager)["transformers"], FlexiGPTForCausalLM.__name__, FlexiGPTForCausalLM)
    # It loads the model before it listens, and says nothing when it does.
    note(f"once loaded, {model} is served by this name at http://{options.host}:{options.port}/v1; Ctrl-C ends it")
    if tokenizer.chat_template is None:
        note("its tokenizer has no chat template: only /v1/completions works")
    logging.disable(logging.INFO)  # uvicorn would tell every request, and can be told nothing else from here
    try:
        with contextlib.suppress(KeyboardInterrupt):
            Serve(
                force_model=model,
                dtype=options.dtype,
                device=str(device),
                host=options.host,
                port=options.port,
                log_level="error",
            )
    finally:
        logging.disable(logging.NOTSET)


def _check_free(host: str, port: int) -> None:
    """Raises InputError where nobody can listen: a web server would say so after the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise InputError(f"--host {host} --port {port} cannot be listened at: {error.strerror}") from error
