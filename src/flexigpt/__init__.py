"""Smaller large language models: MLPs keep their best units, or blocks are shared (FlexiGPT, NAACL 2025).

Importing it lets `AutoModelForCausalLM.from_pretrained` open compact checkpoints. A name is loaded when it is first
used. The rooms of the code; imports go down this table only:

    cli          arguments in, one flow called, its result printed
    pruning      source -> plan -> compact model; plain removal; extension
    recovery     trains a model back
    quantization linears in 8 or 4 bits
    decoding     generates, drafts and verifies, times both; has a model write its own text
    serving      other programs' servers, taught what a compact model is
    report       records -> figures and a page
    export       a compact model in the forms that other programs read
    record       what a flow was asked and measured: made, written, read back, as tables
    replicas     what stands in for what is pruned: units chosen, adapters started; what is left, refitted
    evaluation   perplexity, tasks, nearness to the source
    calibration  text through the blocks, one at a time, and gradients back; moments
    weights      models on disk: opened, read block by block, written
    model        what a compact model is: plan, architectures, modules, layout
    text         text -> tokens -> windows and training batches
    runtime      what every flow runs on: errors, progress, cache, files, machine, processes
"""

from typing import TYPE_CHECKING

from flexigpt.model.registration import register_when_imported
from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    __version__: str
    from flexigpt.decoding import BenchmarkOptions as BenchmarkOptions
    from flexigpt.decoding import SampleOptions as SampleOptions
    from flexigpt.decoding import SpeculateOptions as SpeculateOptions
    from flexigpt.decoding import SpeculateStatistics as SpeculateStatistics
    from flexigpt.decoding import benchmark as benchmark
    from flexigpt.decoding import sample as sample
    from flexigpt.decoding import speculative_generate as speculative_generate
    from flexigpt.evaluation import EvalOptions as EvalOptions
    from flexigpt.evaluation import evaluate as evaluate
    from flexigpt.export import ExportOptions as ExportOptions
    from flexigpt.export import export as export
    from flexigpt.model import FlexiGPTConfig as FlexiGPTConfig
    from flexigpt.model import FlexiGPTForCausalLM as FlexiGPTForCausalLM
    from flexigpt.model import Plan as Plan
    from flexigpt.model import Replica as Replica
    from flexigpt.model import materialize as materialize
    from flexigpt.pruning import PRESETS as PRESETS
    from flexigpt.pruning import ExtendOptions as ExtendOptions
    from flexigpt.pruning import FrontierOptions as FrontierOptions
    from flexigpt.pruning import PruneOptions as PruneOptions
    from flexigpt.pruning import assemble_extended as assemble_extended
    from flexigpt.pruning import assemble_pruned as assemble_pruned
    from flexigpt.pruning import assemble_removed as assemble_removed
    from flexigpt.pruning import extend as extend
    from flexigpt.pruning import frontier as frontier
    from flexigpt.pruning import plan_only as plan_only
    from flexigpt.pruning import prune as prune
    from flexigpt.pruning import remove as remove
    from flexigpt.quantization import QuantizeOptions as QuantizeOptions
    from flexigpt.quantization import quantize as quantize
    from flexigpt.record import inspect_model as inspect_model
    from flexigpt.record import write_checkpoint as write_checkpoint
    from flexigpt.recovery import RecoverOptions as RecoverOptions
    from flexigpt.recovery import recover as recover
    from flexigpt.report import report as report
    from flexigpt.runtime import InputError as InputError
    from flexigpt.runtime import bars as bars
else:
    lazy_door(__name__)

register_when_imported()
