"""For llama.cpp: one GGUF file. Where MLPs differ in width it is of llama.cpp's `deci`, a LLaMA with sizes per block.

Its own converter needs one width for all MLPs, and so the size of the source.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import PreTrainedModel

from flexigpt.export.families import check_family, reach
from flexigpt.export.gguf_vocabulary import add_vocabulary
from flexigpt.export.options import ExportOptions
from flexigpt.export.stock import check_foldable, rounded, unshrunk
from flexigpt.model import SOURCE_PREFIX, FlexiGPTForCausalLM, materialize, mlp_widths
from flexigpt.runtime import InputError, one_line
from flexigpt.weights import load_model

FILE = "model.gguf"
# llama.cpp's own architecture of each source's model type.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_BY_BLOCK = "deci"
# Where rotary positions turn neighbours, so that queries and keys lie in another order.
_NEIGHBOURS = ("llama", _BY_BLOCK)
_GROUP = 32  # weights that are quantised together


def to_gguf(model: str, out: Path, options: ExportOptions) -> None:
    """Writes OUT/model.gguf.

    Raises:
        InputError: output norms; a family, a setting or a tokenizer that llama.cpp would read differently; no `gguf`.
    """
    gguf = _library()
    compact: Any = load_model(model, device="cpu")
    assert isinstance(compact, FlexiGPTForCausalLM)
    kind = compact.config.text_config.model_type
    check_family(compact.config.text_config, "gguf", tuple(_ARCHITECTURES))
    check_foldable(compact)
    if compact.config.replicas:
        compact = materialize(compact)
    # Qwen 3 norms its queries, which `deci` does not.
    by_block = bool(compact.config.sublayers) and kind != "qwen3"
    made = rounded(compact, _GROUP, fill_gone=True) if by_block else unshrunk(compact)
    architecture = _BY_BLOCK if by_block else _ARCHITECTURES[kind]
    gone = {row["block"] for row in compact.config.sublayers if by_block and row["sublayer"] == "attention"}
    writer = gguf.GGUFWriter(out / FILE, architecture)
    with _quiet():
        _add_settings(gguf, writer, made, gone)
        add_vocabulary(gguf, writer, model, compact.config.text_config)
        _write(gguf, writer, list(_tensors(gguf, architecture, made, gone)), options.bits)
    writer.close()


def _library() -> Any:
    try:
        import gguf  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InputError(f"--to gguf needs gguf ({one_line(error)}): pip install 'flexigpt[export]'") from error
    return gguf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it `gguf` says nothing of what it writes."""
    logger = logging.getLogger("gguf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _add_settings(gguf: Any, writer: Any, made: PreTrainedModel, gone: set[int]) -> None:
    """Sizes, per block where they differ, and rotary positions."""
    config: Any = made.config.get_text_config()
    widths = mlp_widths(made)
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    by_block = writer.arch == _BY_BLOCK
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(reach(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths if by_block else widths[0])
    writer.add_head_count([0 if block in gone else heads for block in range(len(widths))] if by_block else heads)
    writer.add_head_count_kv([0 if block in gone else keys for block in range(len(widths))] if by_block else keys)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _tensors(gguf: Any, architecture: str, made: PreTrainedModel, gone: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each stored tensor by llama.cpp's name for it."""
    config: Any = made.config.get_text_config()
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    without = {f"model.layers.{block}.{part}." for block in gone for part in ("self_attn", "input_layernorm")}
    if config.rope_parameters["rope_type"] == "llama3":
        rope = made.get_decoder().rotary_emb
        base = config.rope_parameters["rope_theta"] ** (torch.arange(len(rope.inv_freq)) / len(rope.inv_freq))
        yield "rope_freqs.weight", 1 / (base * rope.inv_freq)
    for name, values in made.named_parameters():
        name = name.removeprefix(SOURCE_PREFIX)
        if name.startswith(tuple(without)):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if architecture in _NEIGHBOURS and heads is not None:
            # From (first half, second half) of each head to neighbours.
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), values


def _write(gguf: Any, writer: Any, tensors: list[tuple[str, torch.Tensor]], bits: int | None) -> None:
    """Writes all tensors, one at a time in memory."""
    kinds = gguf.GGMLQuantizationType
    plain = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}
    quantised = {8: kinds.Q8_0, 4: kinds.Q4_0}
    files = {kinds.F32: "ALL_F32", kinds.F16: "MOSTLY_F16", kinds.BF16: "MOSTLY_BF16"}
    files |= {kinds.Q8_0: "MOSTLY_Q8_0", kinds.Q4_0: "MOSTLY_Q4_0"}

    def kind(name: str, values: torch.Tensor) -> Any:
        if values.ndim < 2:
            return kinds.F32
        if bits is None or values.shape[-1] % _GROUP:
            return plain[values.dtype]
        # The head, which the embeddings may be, decides the token: its errors are not averaged by what follows.
        return quantised[8 if name.startswith(("token_embd", "output")) else bits]

    of_blocks = next(values for name, values in tensors if name.startswith("blk.") and values.ndim == 2)
    writer.add_file_type(gguf.LlamaFileType[files[quantised[bits] if bits else plain[of_blocks.dtype]]])
    for name, values in tensors:
        stored = gguf.quants.quant_shape_to_byte_shape(values.shape, kind(name, values))
        size = int(numpy.prod(stored))
        writer.add_tensor_info(name, values.shape, numpy.dtype("float32"), size, raw_dtype=kind(name, values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, values in tensors:
        full = values.detach().to(torch.float32).contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(full, kind(name, values)))
