"""What stands in for what is pruned: an MLP's best units, or a block's adapters and norms; and the refit of the rest.

In: a plan, the source, calibration windows. Out: the tensors that are not the source's. Read `options`,
`least_squares`, `elimination` (which units to keep), `svd`, `initialization`, then `fitting`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.replicas.elimination import Elimination, eliminate, readers_of_units
    from flexigpt.replicas.fitting import hidden_copies, refit_kept
    from flexigpt.replicas.initialization import adapter_spectra, fill, init_of, replica_tensors
    from flexigpt.replicas.options import MOST_GAMMA, REPLICA_GROUP, ReplicaOptions
    from flexigpt.replicas.svd import LowRank, tail_norm, truncated_svd, unmended
else:
    lazy_door(__name__)
