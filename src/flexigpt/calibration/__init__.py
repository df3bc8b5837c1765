"""Text through the blocks of a model, one block at a time; statistics streamed out.

In: a streamed model and windows of token ids. Out: hidden states, means over tokens, sums. Read
`options`, `hidden_states`, `states`, `moments`, `probe`, then `sensitivity`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.calibration.hidden_states import (
        BlockStatistic,
        HiddenStates,
        Stream,
        batch_tokens,
        block_means,
        calibration_batches,
        check_means,
        finished_blocks,
        overflow,
        run_through,
    )
    from flexigpt.calibration.moments import RunningMoment, RunningSum
    from flexigpt.calibration.options import TEXT_GROUP, CalibrationOptions
    from flexigpt.calibration.probe import Probe
    from flexigpt.calibration.sensitivity import Sensitivity, sensitivities
    from flexigpt.calibration.states import SourceStates
else:
    lazy_door(__name__)
