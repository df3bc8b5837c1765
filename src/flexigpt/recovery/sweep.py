"""A learning rate found by trying: a short run at each of a few, from the same start and on the same text.

Each run's rate falls to zero within it, or the larger rates would look worse than they are; what is compared is the
training's own loss on windows that none of the runs has read.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import torch

from flexigpt.recovery.checkpoints import RunFolder
from flexigpt.recovery.options import DEFAULT_RATE
from flexigpt.recovery.training import NotFiniteError, Settings, Training
from flexigpt.runtime import InputError, Track

# Rates that are tried at most; of the run's steps, the share that each gets, and the fewest that it needs.
TRIALS, _SHARE, _LEAST_STEPS = 4, 0.05, 5

# Windows to compare on, at least; a gain that so short a run can tell, of the loss; and how much worse than the best
# so far, on the same batch, a run is given up.
_JUDGING_WINDOWS, _CLEARLY, _WORSE = 16, 1e-3, 1.05

# {"lr", "loss" on the windows to compare on (None: given up), "losses" of the steps}
Trial = dict[str, Any]


def steps_of_trial(steps: int) -> int:
    """Steps that each rate is tried for, of a run of so many.

    Raises:
        InputError: a run so short that trying might take longer.
    """
    each = max(_LEAST_STEPS, round(_SHARE * steps))
    if TRIALS * each > steps:
        raise InputError(
            f"--lr auto tries up to {TRIALS} rates for {each} steps each, more than the run's {steps}: give --lr X, "
            "more --tokens, or fewer --batch-tokens"
        )
    return each


def best_of(trials: list[Trial]) -> Trial | None:
    """The best one so far; a later one has to be clearly better. None: all were given up."""
    best: Trial | None = None
    for trial in trials:
        if trial["loss"] is not None and (best is None or trial["loss"] < best["loss"] * (1 - _CLEARLY)):
            best = trial
    return best


def next_rate(trials: list[Trial]) -> float | None:
    """The rate to try after these: half or twice the best one, until neither is better; None: it is found.

    Raises:
        InputError: every rate was given up.
    """
    if not trials:
        return DEFAULT_RATE
    tried, best = [trial["lr"] for trial in trials], best_of(trials)
    if best is None and len(trials) == TRIALS:
        rates = ", ".join(f"{rate:g}" for rate in sorted(tried))
        raise InputError(f"--lr auto found no rate: the loss is not finite at {rates}; check the model, or give --lr X")
    around = (min(tried) / 2,) if best is None else (best["lr"] / 2, best["lr"] * 2)
    return next((rate for rate in around if rate not in tried and len(trials) < TRIALS), None)


class Sweep:
    """Tries rates until one is found.

    Args:
        training: not a step done yet.
        settings_at: rate -> the settings of the whole run at that rate.
        read: number -> so many batches from the text's beginning, as `iterate` gives them.
        folder: keeps each finished trial.
        interrupted: set when the run is to stop.
    """

    def __init__(
        self,
        training: Training,
        settings_at: Callable[[float], Settings],
        read: Callable[[int], Generator[tuple[torch.Tensor, Any], None, None]],
        folder: RunFolder,
        interrupted: threading.Event,
    ) -> None:
        self._training, self._settings_at, self._read = training, settings_at, read
        self._folder, self._interrupted = folder, interrupted
        self._steps = steps_of_trial(training.settings.steps)

    def find(self, track: Track, note: Callable[[str], None]) -> list[Trial]:
        """Every trial; afterwards the training is at its beginning, at the best rate. Every process must call it.

        Raises:
            InputError: no rate was found, or the run was interrupted; finished trials are kept.
        """
        training, trials = self._training, self._folder.trials()
        steps, most = training.settings.steps, TRIALS * self._steps
        note(f"--lr auto tries up to {TRIALS} rates, {self._steps} steps each: {most / steps:.0%} of the run at most")
        beginning = training.copied()
        while (rate := next_rate(trials)) is not None:
            whole = self._settings_at(rate)
            warmup = round(whole.warmup_steps * self._steps / whole.steps)
            training.begin_again(beginning, replace(whole, steps=self._steps, warmup_steps=warmup))
            trial = self._tried(rate, best_of(trials), track)
            trials.append(trial)
            self._folder.keep_trials(trials)
            loss, taken = trial["loss"], len(trial["losses"])
            note(f"lr {rate:g}: " + (f"given up after step {taken}" if loss is None else f"loss {loss:.4f}"))
        best = best_of(trials)
        assert best is not None
        training.begin_again(beginning, self._settings_at(best["lr"]))
        note(f"trains with --lr {best['lr']:g}")
        return trials

    def _tried(self, rate: float, best: Trial | None, track: Track) -> Trial:
        """What a rate gives; it is given up where it is clearly worse than the best."""
        training, judging = self._training, self._judging_batches()
        loss, losses = None, list[float]()
        with closing(self._read(self._steps + judging)) as batches, suppress(NotFiniteError):
            for step in track(range(self._steps), f"trying lr {rate:g}", self._steps):
                losses.append(training.step(step, next(batches)[0])["loss"])
                self._check_interrupted()
                halfway = 2 * len(losses) > self._steps
                if best is not None and halfway and losses[-1] > _WORSE * best["losses"][step]:
                    break
            else:
                loss = sum(training.loss_on(windows) for windows, _ in batches) / judging
        return {"lr": rate, "loss": loss, "losses": losses}

    def _judging_batches(self) -> int:
        """No more than the whole run reads, whose text is known to suffice."""
        return min(-(-_JUDGING_WINDOWS // self._training.settings.batch_windows), (TRIALS - 1) * self._steps)

    def _check_interrupted(self) -> None:
        """Where any process is to stop, all do."""
        told = torch.tensor([self._interrupted.is_set()], device=self._training.device).float()
        if self._training.world.sum(told).item():
            raise InputError("interrupted while learning rates were tried: --resume goes on from there")
