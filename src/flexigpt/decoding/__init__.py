"""Generates text, drafts and verifies, times both.

Read `draft`, `split`, `speculate`, `generate`, then `variants` and `benchmark`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.decoding.benchmark import (
        BenchmarkOptions,
        benchmark,
        benchmark_markdown,
        benchmark_notes,
        benchmark_tables,
    )
    from flexigpt.decoding.draft import SpeculateOptions, SpeculateStatistics
    from flexigpt.decoding.generate import GenerateOptions, generate
    from flexigpt.decoding.speculate import speculative_generate
else:
    lazy_door(__name__)
