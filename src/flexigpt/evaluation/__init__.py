"""What models are worth: perplexity, benchmark tasks, how near they stay to their source.

In: models and a text, or the names of tasks. Out: an evaluation, JSON-ready. Read `metrics` (what is measured: a new
metric is a class there), `perplexity` (the walk over a text), `fidelity`, `tasks` (the only file that knows lm_eval),
then `evaluate`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.evaluation.evaluate import Evaluation, evaluate, is_same, mean_accuracy
    from flexigpt.evaluation.fidelity import measure_fidelity
    from flexigpt.evaluation.metrics import METRICS
    from flexigpt.evaluation.options import EvalOptions
    from flexigpt.evaluation.perplexity import LOGITS_BUDGET, logits_over, perplexity, windows_perplexity
else:
    lazy_door(__name__)
