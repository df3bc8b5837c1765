"""Settings without effect beside others: Python does as it is told, the command line refuses what was typed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexigpt.runtime import InputError, flag

# Of each command: (fields, why they have no effect, whether that holds for these options).
Rule = tuple[Sequence[str], str, Callable[[Any], bool]]
_SAMPLES: Rule = (("top_p", "seed"), "there is no --temperature", lambda asked: not asked.temperature)
IDLE: Mapping[str, Sequence[Rule]] = {
    "prune": (
        (("block_score",), "--blocks names the blocks", lambda asked: asked.blocks is not None),
        (("rank", "base_distance", "block_score"), "the plan decides it", lambda asked: asked.plan is not None),
        (
            ("rank", "base_distance", "adapter_init", "output_norm"),
            "--remove makes no replica",
            lambda asked: asked.remove,
        ),
        (
            ("rank", "base_distance", "block_score", "adapter_init", "output_norm"),
            "the form units makes no replicas of blocks",
            lambda asked: asked.by_units and asked.plan is None,
        ),
        (
            ("adapter_init", "output_norm"),
            "the plan has no replicas of blocks",
            lambda asked: asked.plan is not None and not asked.plan_has_replicas,
        ),
        (("calibration", "windows"), "no calibration text is read", lambda asked: not asked.calibrates),
        (
            ("window_length",),
            "no text is read",
            lambda asked: not asked.calibrates and asked.perplexity is None,
        ),
        (
            ("seed",),
            "nothing is drawn at random",
            lambda asked: not asked.calibrates and (asked.remove or asked.adapter_init == "svd"),
        ),
    ),
    "plan": (
        (("refit_kept",), "--plan-only makes no model", lambda asked: True),
        (("perplexity",), "--plan-only makes no model", lambda asked: asked.max_loss is None),
        (("adapter_init", "output_norm"), "--plan-only makes no replica", lambda asked: True),
    ),
    "extend": ((("window_length",), "no text is read", lambda asked: asked.perplexity is None),),
    "recover": (
        (("distill_weight",), "there is no --teacher", lambda asked: asked.teacher is None),
        (("draft_weight", "replica_lr"), "replicas alone are trained", lambda asked: asked.train == "replicas"),
        (("lora_rank",), "kept blocks get no LoRA", lambda asked: asked.train != "replicas+kept"),
    ),
    "eval": (
        (("against", "window_length"), "there is no --perplexity", lambda asked: asked.perplexity is None),
        (
            ("num_fewshot", "limit", "batch_size", "include_path"),
            "there are no --tasks",
            lambda asked: asked.tasks is None,
        ),
    ),
    "quantize": ((("window_length",), "there is no --perplexity", lambda asked: asked.perplexity is None),),
    "generate": (_SAMPLES,),
    "chat": (_SAMPLES,),
}


def refuse_idle(command: str, typed: Mapping[str, Any], options: Any) -> None:
    """Refuses settings that were typed and have no effect.

    Args:
        command: a key of IDLE; others have no rules.
        typed: the fields that were typed.
        options: of the run.

    Raises:
        InputError: the first of them, and those that have none for the same reason.
    """
    for fields, reason, holds in IDLE.get(command, ()):
        given = [field for field in fields if field in typed]
        if given and holds(options):
            names = ", ".join(flag(field) for field in given)
            raise InputError(f"{names} without effect, since {reason}: leave {'it' if len(given) == 1 else 'them'} out")
