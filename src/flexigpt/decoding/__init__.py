"""Generates text, drafts and verifies, times both; has a model write the text that it is calibrated on.

Read `options`, `draft`, `split`, `speculate`, `generate`, then `benchmark`; for sampling `drafts`, `rounds`, `sample`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.decoding.benchmark import benchmark, benchmark_rows
    from flexigpt.decoding.draft import SpeculateStatistics
    from flexigpt.decoding.generate import generate
    from flexigpt.decoding.options import BenchmarkOptions, GenerateOptions, SampleOptions, SpeculateOptions
    from flexigpt.decoding.sample import sample
    from flexigpt.decoding.speculate import speculative_generate
else:
    lazy_door(__name__)
