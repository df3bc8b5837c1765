"""Smaller large language models by sharing blocks (FlexiGPT, NAACL 2025).

Importing it lets `AutoModelForCausalLM.from_pretrained` open compact checkpoints.
"""

from transformers import AutoConfig as _AutoConfig
from transformers import AutoModelForCausalLM as _AutoModelForCausalLM

from flexigpt.configuration_flexigpt import FlexiGPTConfig as FlexiGPTConfig
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM as FlexiGPTForCausalLM

_AutoConfig.register(FlexiGPTConfig.model_type, FlexiGPTConfig)
_AutoModelForCausalLM.register(FlexiGPTConfig, FlexiGPTForCausalLM)
