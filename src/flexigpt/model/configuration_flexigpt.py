"""Configuration of a compact model. Travels with every checkpoint, so it imports nothing but transformers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# The newest that is read. Version 2 has base scales, version 3 ranks of single linears, version 4 replicas of single
# sublayers; the least that says it all is written.
FORMAT_VERSION = 4


class FlexiGPTConfig(PreTrainedConfig):
    """A source model's own configuration, the plan, and where the plan applies.

    Args:
        text_config: the source's configuration (for an extended model with the depth of the compact model).
        replicas: the plan's replicas, rows of `block`, `base` and `rank`, and, where linears have ranks of their own,
            `ranks` by path.
        sublayers: the plan's replicas of single sublayers, rows of `block`, `sublayer`, `form` and `units`.
        sublayer_paths: of `attention` and `mlp`, within the block: its `module`, empty where there is none; of the MLP
            also the `inner` linears that compute its hidden units, the `outer` one that takes them, and how many
            `units` the source has. Only where there are such replicas.
        blocks: path of the list of blocks within the source model.
        linears: paths of a block's linears, within the block.
        output_norms: paths within the block of the modules whose output an output norm normalises: the last ones of
            attention and MLP before the residual addition. Empty for replicas without output norms.
        base_scale: whether each linear of a replica scales its base's output by a number of its own.
        output_norm_eps: added to the variance under the root.
        format_version: version of the checkpoint format.

    Raises:
        ValueError: a checkpoint of a newer format version; a text_config that is none.
    """

    model_type = "flexigpt"
    # transformers sends the attention implementation and the dtype on to what is named here.
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True
    _auto_class = "AutoConfig"
    # The compact model's own. All else is read from the source's configuration and written to it, so that a setting
    # has one place, and an edited one has an effect.
    _own = frozenset(
        (
            *("text_config", "replicas", "blocks", "linears", "output_norms", "output_norm_eps", "base_scale"),
            *("sublayers", "sublayer_paths"),
            *("format_version", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
            *("model_type", "name_or_path", "attn_implementation", "experts_implementation", "quantization_config"),
            *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "num_labels", "problem_type"),
        )
    )
    # What every configuration has from its class, so that `__getattr__` is never asked for it.
    # Written only where there are such replicas: a checkpoint without them is what it was before there were any.
    sublayers: tuple[dict[str, Any], ...] | list[dict[str, Any]] = ()
    sublayer_paths: dict[str, dict[str, Any]] | None = None
    _in_every_class = frozenset(("output_hidden_states", "output_attentions", "return_dict", "rope_scaling"))

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
        sublayers: list[dict[str, Any]] | None = None,
        sublayer_paths: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if format_version is None:
            format_version = 3 if any("ranks" in row for row in replicas or ()) else 1 + base_scale
            format_version = 4 if sublayers else format_version
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this compact model has format version {format_version}, this flexigpt reads versions up to "
                f"{FORMAT_VERSION}: upgrade flexigpt"
            )
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if text_config is not None and not isinstance(text_config, PreTrainedConfig):
            raise ValueError(f"text_config is {text_config!r}, where the source's configuration belongs")
        of_source = {name: kwargs.pop(name) for name in list(kwargs) if not self._is_own(name)}
        super().__init__(**kwargs)
        self.replicas = list(replicas or [])
        self.blocks = blocks
        self.linears = list(linears or [])
        self.output_norms = list(output_norms or [])
        self.output_norm_eps = output_norm_eps
        self.base_scale = base_scale
        self.format_version = format_version
        if sublayers:
            self.sublayers, self.sublayer_paths = list(sublayers), sublayer_paths
        self.text_config = text_config
        if kwargs.get("attn_implementation") is not None:
            self._attn_implementation = kwargs["attn_implementation"]  # again, for text_config
        for name, value in of_source.items():
            setattr(self, name, value)

    @classmethod
    def _is_own(cls, name: str) -> bool:
        return name in cls._own or name.startswith("_")

    def __getattribute__(self, name: str) -> Any:
        if name in FlexiGPTConfig._in_every_class:
            source = self.__dict__.get("text_config")
            if source is not None:
                return getattr(source, name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("text_config")
        if source is not None and not self._is_own(name):
            return getattr(source, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        source = self.__dict__.get("text_config")
        if source is None or self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(source, name, value)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The source's configuration: `generate` sizes its cache by it."""
        return self.__dict__.get("text_config") or self
