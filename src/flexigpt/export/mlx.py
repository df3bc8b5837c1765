"""For MLX, on Apple's machines: each weight once, with a model file that mlx-lm runs."""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flexigpt.export.families import check_family, reach
from flexigpt.export.options import ExportOptions
from flexigpt.export.stock import rounded, with_older_rope, write_tokenizer
from flexigpt.model import SOURCE_PREFIX, FlexiGPTConfig, FlexiGPTForCausalLM
from flexigpt.runtime import InputError, one_line
from flexigpt.weights import Piece, load_model, write_shards

MODEL_FILE = "flexigpt_mlx.py"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_GROUP = 64  # weights that mlx-lm quantises together
_SHARD = 5 * 10**9


def to_mlx(model: str, out: Path, options: ExportOptions) -> None:
    """Writes a checkpoint that `mlx_lm.load(OUT, trust_remote_code=True)` opens, sharing kept.

    Raises:
        InputError: a family or a setting that mlx-lm would compute differently; no mlx-lm where weights are quantised.
    """
    if options.bits is not None:
        _check_installed()
    compact: Any = load_model(model, device="cpu")
    assert isinstance(compact, FlexiGPTForCausalLM)
    check_family(compact.config.text_config, "mlx", FAMILIES)
    if options.bits is not None:
        compact = rounded(compact, _GROUP)
    pieces = [
        Piece(name.removeprefix(SOURCE_PREFIX), values.dtype, tuple(values.shape), values.detach())
        for name, values in compact.named_parameters()
    ]
    write_shards(out, pieces, _SHARD)
    (out / "config.json").write_text(json.dumps(_settings(compact.config), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("mlx_model.py"), out / MODEL_FILE)
    if compact.generation_config is not None:
        compact.generation_config.save_pretrained(out)
    write_tokenizer(model, out)
    if options.bits is not None:
        _quantize(out, options.bits)


def _check_installed() -> None:
    try:
        import mlx_lm  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise InputError(
            f"--to mlx --bits needs mlx-lm ({one_line(error)}): pip install 'flexigpt[export]', or leave --bits out"
        ) from error


def _settings(config: FlexiGPTConfig) -> dict[str, Any]:
    """The source's config.json, and what the model file reads."""
    source: Any = config.text_config
    names = ("replicas", "linears", "output_norms", "output_norm_eps", "base_scale")
    compact = {name: getattr(config, name) for name in names} | {"sublayers": list(config.sublayers)}
    settings = json.loads(source.to_json_string(use_diff=False))
    settings |= {"model_file": MODEL_FILE, "flexigpt": compact, "max_position_embeddings": reach(source)}
    return with_older_rope(settings)


def _quantize(out: Path, bits: int) -> None:
    """Quantises what was written, by mlx-lm; adapters, norms and what has no rows of that many weights stay."""
    from mlx_lm.utils import load_model as opened  # noqa: PLC0415
    from mlx_lm.utils import quantize_model, save_config, save_model  # noqa: PLC0415

    # It says how many bits a weight has, and takes brackets in a path for a pattern.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model"
        link.symlink_to(out.resolve(), target_is_directory=True)
        model, settings = quantize_model(*opened(link, trust_remote_code=True), _GROUP, bits)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    save_model(out, model)
    save_config(settings, out / "config.json")
