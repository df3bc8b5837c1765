"""What vLLM calls when it starts, in each of its processes (entry point group `vllm.general_plugins`)."""

from vllm import ModelRegistry


def register() -> None:
    """Tells vLLM of the compact model. Its configuration is registered with transformers by importing flexigpt.

    By name, so that nothing of CUDA is loaded before vLLM starts its workers.
    """
    ModelRegistry.register_model("FlexiGPTForCausalLM", "flexigpt.serving.vllm_model:FlexiGPTForCausalLM")
