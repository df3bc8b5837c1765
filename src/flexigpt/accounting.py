"""What a model stores: parameters of each part, every tensor counted once."""

from transformers import PreTrainedModel

from flexigpt.architecture import find_architecture
from flexigpt.checkpoint import plan_of
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM


def count_parts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of each part; every parameter is in exactly one."""
    if isinstance(model, FlexiGPTForCausalLM):
        blocks, linears = f"language_model.{model.config.blocks}.", model.config.linears
        pruned = set(plan_of(model.config).pruned)
    else:
        architecture = find_architecture(model.config)
        blocks, linears = f"{architecture.blocks}.", list(architecture.linears)
        pruned = set()
    weights = {f"{path}.weight" for path in linears}
    head = model.get_output_embeddings()
    outside = {id(p): "output head" for p in (head.parameters() if head else ())}
    outside |= {id(p): "embeddings" for p in model.get_input_embeddings().parameters()}
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(blocks):
            part = outside.get(id(parameter), "outside the blocks, other")
        else:
            block, _, path = name.removeprefix(blocks).partition(".")
            if int(block) not in pruned:
                part = "kept blocks, linears" if path in weights else "kept blocks, norms and biases"
            elif path.endswith((".adapter_A", ".adapter_B")):
                part = "replicas, adapters"
            elif path.endswith(".base_scale"):
                part = "replicas, base scales"
            elif path.endswith(".output_norm.weight"):
                part = "replicas, output norms"
            else:
                part = "replicas, norms and biases"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
