"""What programs beside transformers compute as the source does, and what they would compute differently."""

from transformers import PreTrainedConfig

from flexigpt.runtime import InputError

_ROTATIONS = ("default", "linear", "llama3", "yarn")


def check_family(config: PreTrainedConfig, form: str, families: tuple[str, ...]) -> None:
    """Refuses what would be computed differently there.

    Args:
        config: the source's.
        form: that is to be written.
        families: the model types that can be.

    Raises:
        InputError: another family; activations, rotary positions, windows or biases that only transformers computes.
    """
    kind = config.model_type
    if kind not in families:
        raise InputError(
            f"--to {form} writes {', '.join(families)}, this is a {kind}: export it --to stock, and convert that with "
            "the other program's own converter"
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise InputError(
            f"--to {form} computes silu in the MLPs, this model {activation}: export it --to stock, and convert that "
            "with the other program's own converter"
        )
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in _ROTATIONS:
        raise InputError(f"--to {form} has no rotary positions of type {rotation}, only {', '.join(_ROTATIONS)}")
    if kind != "mistral" and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise InputError(f"--to {form} has no windows of attention (layer_types), which this {kind} has")
    if kind == "qwen3" and config.attention_bias:
        raise InputError(f"--to {form} has no biases in the attention of qwen3 (attention_bias), which this model has")


def reach(config: PreTrainedConfig) -> int:
    """Positions at which the other program, which has no windows of attention, computes what the model does."""
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)
