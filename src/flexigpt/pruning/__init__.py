"""Source -> plan -> compact model; plain removal; extension.

Read `options`, `source`, `allocation` (units), `distances` and `scores` (whole blocks), `estimate`, then the flows
`prune`, `remove`, `extend`, and `frontier`, which makes many of both.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.pruning.estimate import Estimate
    from flexigpt.pruning.extend import assemble_extended, extend
    from flexigpt.pruning.frontier import frontier
    from flexigpt.pruning.options import PRESETS, ExtendOptions, FrontierOptions, PruneOptions
    from flexigpt.pruning.prune import assemble_pruned, plan_only, prune
    from flexigpt.pruning.remove import assemble_removed, remove
else:
    lazy_door(__name__)
