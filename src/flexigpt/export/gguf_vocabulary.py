"""A tokenizer as llama.cpp reads it."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from flexigpt.runtime import InputError
from flexigpt.weights import load_tokenizer

# llama.cpp splits a text before its merges by rules that it knows by name. Here is what each makes of one text.
_PROBE = "it's IT'S 1234567  xY\n\n\ny ?!\n a"
_DIGITS = ("1", "2", "3", "4", "5", "6", "7")
_SPLITS: dict[tuple[str, ...], str] = {
    ("it", "'s", " IT", "'", "S", " 1234567", " ", " xY", "\n\n", "\n", "y", " ?!", "\n", " a"): "gpt-2",
    ("it", "'s", " IT", "'", "S", " ", *_DIGITS, " ", " xY", "\n\n", "\n", "y", " ?!", "\n", " a"): "smollm",
    ("it", "'s", " IT", "'S", " ", "123", "456", "7", " ", " xY", "\n\n\n", "y", " ?!\n", " a"): "llama-bpe",
    ("it", "'s", " IT", "'S", " ", *_DIGITS, " ", " xY", "\n\n\n", "y", " ?!\n", " a"): "qwen2",
}
_WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is one, whatever the merges say
_OTHERWISE = (
    "--to gguf does not know how llama.cpp would split text for this tokenizer: export it --to stock, and convert that "
    "with llama.cpp's convert_hf_to_gguf.py"
)


def add_vocabulary(gguf: Any, writer: Any, model: str, config: PreTrainedConfig) -> None:
    """Adds the tokenizer that lies beside a model, its special tokens and its chat template.

    Raises:
        InputError: none there, or one that llama.cpp would read differently.
    """
    tokenizer: Any = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        if not path.is_file():
            raise InputError(_OTHERWISE)
        rules = json.loads(path.read_text(encoding="utf-8"))
        settings = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        Path(folder, "config.json").write_text(json.dumps(settings), encoding="utf-8")
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    known = dict.fromkeys(tokens, kinds.NORMAL)
    known |= {n: kinds.CONTROL if t.special else kinds.USER_DEFINED for n, t in tokenizer.added_tokens_decoder.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(tokenizer, rules))
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(config.vocab_size)])
    writer.add_token_types([known.get(number, kinds.UNUSED) for number in range(config.vocab_size)])
    special.add_special_token["bos"] = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    special.add_to_gguf(writer, quiet=True)


def splitting(tokenizer: Any, rules: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits a text before its merges.

    Args:
        tokenizer: a fast one.
        rules: its tokenizer.json.

    Raises:
        InputError: one that llama.cpp would read differently.
    """
    before = tokenizer.backend_tokenizer.pre_tokenizer
    if rules["model"]["type"] != "BPE" or rules["model"].get("byte_fallback") or before is None:
        raise InputError(_OTHERWISE)
    pieces = tuple(_PROBE[start:end] for _, (start, end) in before.pre_tokenize_str(_PROBE))
    name = _SPLITS.get(pieces, "")
    if not name or bool(rules["model"].get("ignore_merges")) != (name in _WHOLE_WORDS):
        raise InputError(_OTHERWISE)
    return name
