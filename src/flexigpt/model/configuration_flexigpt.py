"""Configuration of a compact model. Travels with every checkpoint, so it imports nothing but transformers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# The newest that is read. Version 2 has base scales, version 3 ranks of single linears; the least that says it all is
# written.
FORMAT_VERSION = 3


class FlexiGPTConfig(PreTrainedConfig):
    """A source model's own configuration, the plan, and where the plan applies.

    Args:
        text_config: the source's configuration (for an extended model with the depth of the compact model).
        replicas: the plan's replicas, rows of `block`, `base` and `rank`, and, where linears have ranks of their own,
            `ranks` by path.
        blocks: path of the list of blocks within the source model.
        linears: paths of a block's linears, within the block.
        output_norms: paths within the block of the modules whose output an output norm normalises: the last ones of
            attention and MLP before the residual addition. Empty for replicas without output norms.
        base_scale: whether each linear of a replica scales its base's output by a number of its own.
        output_norm_eps: added to the variance under the root.
        format_version: version of the checkpoint format.

    Raises:
        ValueError: a checkpoint of a newer format version.
    """

    model_type = "flexigpt"
    # transformers sends the attention implementation and the dtype on to what is named here.
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True
    _auto_class = "AutoConfig"
    # What callers ask a causal language model's configuration for, answered by the source's.
    _delegated = frozenset(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
    )

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        replicas: list[dict[str, Any]] | None = None,
        blocks: str = "",
        linears: list[str] | None = None,
        output_norms: list[str] | None = None,
        output_norm_eps: float = 1e-6,
        base_scale: bool = False,
        format_version: int | None = None,
        **kwargs: Any,
    ) -> None:
        if format_version is None:
            format_version = 3 if any("ranks" in row for row in replicas or ()) else 1 + base_scale
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this compact model has format version {format_version}, this flexigpt reads versions up to "
                f"{FORMAT_VERSION}: upgrade flexigpt"
            )
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.replicas = list(replicas or [])
        self.blocks = blocks
        self.linears = list(linears or [])
        self.output_norms = list(output_norms or [])
        self.output_norm_eps = output_norm_eps
        self.base_scale = base_scale
        self.format_version = format_version
        kwargs["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in FlexiGPTConfig._delegated and self.__dict__.get("text_config") is not None:
            return getattr(self.text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The source's configuration: `generate` sizes its cache by it."""
        return self if self.text_config is None else self.text_config
