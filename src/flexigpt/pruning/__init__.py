"""Source -> plan -> compact model; plain removal; extension.

Read `options`, `source`, `scores`, `distances`, `replacement`, `estimate`, then the flows `prune`, `baseline`,
`extend`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.pruning.baseline import BaselineOptions, assemble_baseline, baseline, expected_removal
    from flexigpt.pruning.distances import BASE_DISTANCES
    from flexigpt.pruning.estimate import Estimate
    from flexigpt.pruning.extend import PATTERNS, ExtendOptions, assemble_extended, extend, extended_bytes
    from flexigpt.pruning.options import DEFAULT_PRESET, PRESETS, PruneOptions
    from flexigpt.pruning.prune import assemble_pruned, expected, plan_only, prune
    from flexigpt.pruning.scores import BLOCK_SCORES, GREEDY_SCORES, REMOVAL_SCORE, REPLACEMENT_SCORE
    from flexigpt.pruning.source import can_refit
else:
    lazy_door(__name__)
