"""The same model with the weights of its linears in 8 or 4 bits, each stored once."""

from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from flexigpt.evaluation import measure_fidelity, perplexity
from flexigpt.model import count_parts, parameter_bytes, stored_bytes
from flexigpt.quantization.options import LIBRARIES, QuantizeOptions
from flexigpt.record import Record, model_size, new_record, record_of
from flexigpt.runtime import InputError, Track, silent
from flexigpt.text import TokenizedText, check_tokenizer, check_window_length, tokenize_text
from flexigpt.weights import int8, load_model, load_tokenizer, open_empty

BEFORE, AFTER = "unquantised", "quantised"


def quantize(model: str, options: QuantizeOptions, track: Track = silent) -> tuple[PreTrainedModel, Record]:
    """Quantises the blocks' linears. Embeddings, head, norms, adapters, scales and biases stay as they are.

    A base's linear is one module, which its replicas look up: it is quantised once, for all of them.

    Args:
        model: folder or hub name of a source or compact model.
        options: how small, and what to measure.
        track: reports the progress of each stage.

    Returns:
        The quantised model, which `save_pretrained` writes and `from_pretrained` opens, and the record.

    Raises:
        InputError: a model that cannot be opened, is quantised already or has no linear that can be quantised; a
            library that is not installed; a text that cannot be used.
    """
    empty, tokenizer = open_empty(model), load_tokenizer(model)
    check_tokenizer(model, tokenizer, empty.config)
    window_length = check_window_length(options.window_length, empty.config)
    how = _configuration(options.bits, empty.dtype)
    measured: Record = {}
    if options.perplexity is not None:
        text = tokenize_text(options.perplexity, tokenizer, window_length=window_length)
        measured = _measured(model, text, how, options, track)
    record = new_record(model, options, {"window_length": window_length} if measured else {}) | measured
    # Read again: on some CPUs bitsandbytes packs the weights of a model that has run, and would write others.
    quantised = load_model(model, device=options.device, quantization=how)
    before, after = model_size(empty), stored_bytes(quantised)
    if after >= before["bytes"]:
        raise InputError(f"{model} has no linear that {LIBRARIES[options.bits]} quantises: give other --bits")
    parts = count_parts(quantised, lambda _, parameter: parameter_bytes(parameter))
    record |= {"compared": [BEFORE, AFTER], BEFORE: before, AFTER: before | {"bytes": after, "part_bytes": parts}}
    library = LIBRARIES[options.bits]
    record["quantization"] = {"bits": options.bits, "library": library, "version": version(library)}
    origin = record_of(model)
    return quantised, record | ({} if origin is None else {"origin": origin})


def _measured(model: str, text: TokenizedText, how: Any, options: QuantizeOptions, track: Track) -> Record:
    """Perplexity before and after, and how near they are."""
    both = [load_model(model, device=options.device, quantization=one) for one in (None, how)]
    length = check_window_length(options.window_length, both[0].config)
    found = [perplexity(one, text, window_length=length, track=track) for one in both]
    near = measure_fidelity(both[1], both[0], text, window_length=length, against=model, track=track)
    return {
        "perplexity": {"text": options.perplexity, BEFORE: found[0], AFTER: found[1]},
        "fidelity": {name: near[name] for name in ("agreement", "divergence", "tokens")},
    }


def _configuration(bits: int, dtype: torch.dtype) -> Any:
    """How transformers is to quantise a model while it is read."""
    try:
        if bits == 8:
            from transformers import TorchAoConfig  # noqa: PLC0415 - asks for torchao

            return TorchAoConfig(int8())
        import bitsandbytes  # noqa: F401, PLC0415 - optional
        from transformers import BitsAndBytesConfig  # noqa: PLC0415 - asks for bitsandbytes

        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(load_in_4bit=True, **nf4)
    except ImportError as error:
        raise InputError(
            f"--bits {bits} needs {LIBRARIES[bits]}, which is not installed: pip install 'flexigpt[quantize]'"
        ) from error
