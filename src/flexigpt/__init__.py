"""Smaller large language models by sharing blocks (FlexiGPT, NAACL 2025).

Importing it lets `AutoModelForCausalLM.from_pretrained` open compact checkpoints.
"""

from transformers import AutoConfig as _AutoConfig
from transformers import AutoModelForCausalLM as _AutoModelForCausalLM

from flexigpt.baselines import BaselineOptions as BaselineOptions
from flexigpt.baselines import assemble_baseline as assemble_baseline
from flexigpt.baselines import baseline as baseline
from flexigpt.benchmark import BenchmarkOptions as BenchmarkOptions
from flexigpt.benchmark import benchmark as benchmark
from flexigpt.configuration_flexigpt import FlexiGPTConfig as FlexiGPTConfig
from flexigpt.errors import InputError as InputError
from flexigpt.evaluate import EvalOptions as EvalOptions
from flexigpt.evaluate import evaluate as evaluate
from flexigpt.extend import ExtendOptions as ExtendOptions
from flexigpt.extend import assemble_extended as assemble_extended
from flexigpt.extend import extend as extend
from flexigpt.inspection import inspect_model as inspect_model
from flexigpt.materialization import materialize as materialize
from flexigpt.modeling_flexigpt import FlexiGPTForCausalLM as FlexiGPTForCausalLM
from flexigpt.plan import Plan as Plan
from flexigpt.plan import Replica as Replica
from flexigpt.prune import assemble_pruned as assemble_pruned
from flexigpt.prune import plan_only as plan_only
from flexigpt.prune import prune as prune
from flexigpt.prune_options import PRESETS as PRESETS
from flexigpt.prune_options import PruneOptions as PruneOptions
from flexigpt.recover import recover as recover
from flexigpt.recover_options import RecoverOptions as RecoverOptions
from flexigpt.report import report as report
from flexigpt.speculate import speculative_generate as speculative_generate
from flexigpt.speculate_options import SpeculateOptions as SpeculateOptions
from flexigpt.speculate_options import SpeculateStatistics as SpeculateStatistics
from flexigpt.writing import write_checkpoint as write_checkpoint

_AutoConfig.register(FlexiGPTConfig.model_type, FlexiGPTConfig)
_AutoModelForCausalLM.register(FlexiGPTConfig, FlexiGPTForCausalLM)
