"""Recovery: training a compact model back, or an ordinary one by the same loop. Can be killed and resumed."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flexigpt.model import layout_of, stored_bytes
from flexigpt.record import Record, model_size, new_record, write_checkpoint
from flexigpt.recovery.checkpoints import RunFolder
from flexigpt.recovery.measuring import HeldOut
from flexigpt.recovery.options import RecoverOptions, resolve_settings
from flexigpt.recovery.teacher import Teacher, check_teacher
from flexigpt.recovery.tracking import Trackers
from flexigpt.recovery.trainable import USES_LORA, lora_rank_for, matching_lora_rank, merge_lora, prepare_training
from flexigpt.recovery.training import NotFiniteError, Speed, Training, hold_in
from flexigpt.runtime import (
    RECORD,
    InputError,
    Track,
    World,
    check_output,
    check_space,
    find_device,
    joined_world,
    local_device,
    part,
    peak_bytes,
    silent,
)
from flexigpt.text import (
    EndOfText,
    TrainingStream,
    check_enough,
    check_window_length,
    iterate,
    text_fingerprint,
    tokenize_text,
)
from flexigpt.weights import find_file, load_model, load_tokenizer, model_fingerprint, open_empty

_EVALUATIONS = 10

# A checkpoint holds each trained parameter and AdamW's two averages in float32; there are two, and one being written.
_BYTES_PER_TRAINED, _CHECKPOINTS = 12, 3

# (what a step gave, steps of the run)
Log = Callable[[dict[str, float], int], None]


def recover(
    model: str,
    out: str | Path,
    options: RecoverOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    track: Track = silent,
    log: Log | None = None,
) -> Record | None:
    """Trains a model and writes it to `out`; on the way checkpoints go to `out`.recovery, from which it resumes.

    Under torchrun every process calls it. What it computes does not depend on their number, but for rounding.

    Args:
        model: folder or hub name of a compact model, or of an ordinary one of a supported family.
        out: folder for the recovered model; complete or untouched.
        options: what to train, on what, and how.
        resume: goes on from the last checkpoint of the same run that was killed or interrupted.
        overwrite: whether what flexigpt wrote to `out` before, or an unfinished run, may be replaced.
        command: that ran it, for the model card.
        track: told of the progress of each stage.
        log: told of each step's loss, learning rate and speed, and of each measured perplexity.

    Returns:
        The record, JSON-ready; None in all processes but the first. Where the loss ceased to be finite,
        record["recovery"]["stopped"] says so: `out` then holds the last good state.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    out = Path(out)
    check_output(out, (model, options.data, options.teacher, options.perplexity), overwrite)
    device = find_device(local_device(options.device))
    with joined_world(device) as world:
        run = _Run(model, out, options, world, device)
        if world.leads:
            run.track, run.log = track, log
        world.lead(lambda: run.open_folder(resume, overwrite))
        trained = run.train(resume)
        part()  # what follows is one process's work
        try:
            return run.finish(trained, command) if world.leads else None
        except KeyboardInterrupt:
            raise InputError(f"interrupted before {out} was written: --resume does what is left") from None


class _Run:
    """One recovery: what its options stand for, and its stages in order."""

    def __init__(self, model: str, out: Path, options: RecoverOptions, world: World, device: torch.device) -> None:
        self.model, self.out, self.options, self.world, self.device = model, out, options, world, device
        self.track: Track = silent
        self.log: Log | None = None
        self.folder = RunFolder(out, world)
        empty = open_empty(model)
        self.tokenizer = load_tokenizer(model)
        self.window_length = check_window_length(options.window_length, empty.config)
        if options.teacher is not None:
            check_teacher(options.teacher, self.tokenizer, self.window_length)
        if options.draft_weight is not None and not layout_of(empty).bases:
            raise InputError(
                f"--draft-weight has no effect, since {model} has no replicas and so no draft: leave it out"
            )
        rank = options.lora_rank
        if options.match is not None:
            rank = matching_lora_rank(empty, open_empty(options.match))
        self.lora_rank = lora_rank_for(empty, rank) if options.train in USES_LORA else 0
        if options.replica_lr is not None and not layout_of(empty).bases:
            raise InputError(f"--replica-lr has no effect, since {model} has no replicas: leave it out")
        self.origin = _record_of(model)
        self.settings = resolve_settings(options, self.window_length, world, device, self.origin or {})
        self.eval_every = options.eval_every or max(1, round(self.settings.steps / _EVALUATIONS))
        self.history: list[dict[str, float]] = []
        self.measured: dict[str, Any] = {}
        self.stopped: str | None = None

    def open_folder(self, resume: bool, overwrite: bool) -> None:
        """Makes sure that the run's folder holds this very run, or none."""
        if resume:
            self.folder.check(self._identity())
        elif self.folder.path.exists() and not overwrite:
            raise InputError(
                f"{self.folder.path} holds an unfinished run: go on with --resume, or start anew with --overwrite"
            )

    def _identity(self) -> dict[str, Any]:
        """All that the result depends on: what must be the same when a run is resumed."""
        options, settings = self.options, self.settings
        return {
            "model": model_fingerprint(self.model),
            "data": text_fingerprint(options.data),
            "window_length": self.window_length,
            "batch_tokens": settings.batch_tokens,
            "steps": settings.steps,
            "train": options.train,
            "lora_rank": self.lora_rank,
            "teacher": None if options.teacher is None else model_fingerprint(options.teacher),
            "distill_weight": settings.distill_weight,
            "draft_weight": options.draft_weight,
            "perplexity": None if options.perplexity is None else text_fingerprint(options.perplexity),
            "lr": settings.lr,
            "replica_lr": settings.lr * settings.replica_share,
            "warmup_steps": settings.warmup_steps,
            "weight_decay": settings.weight_decay,
            "clip": settings.clip,
            "precision": str(settings.dtype).removeprefix("torch."),
            "seed": options.seed,
        }

    def train(self, resume: bool) -> dict[str, torch.Tensor]:
        """Loads, prepares and trains; returns what was trained, by name, on the CPU."""
        held_out = self._held_out()
        if not resume:
            self.world.lead(self._check_enough)
        training = self._prepare()
        stream = self._stream()
        if resume and self.folder.steps():
            self._restore(training, self.folder.steps()[-1], stream)
        else:
            self.folder.start(self._identity())
        if held_out is not None and "before" not in self.measured:
            self.measured["before"] = held_out.of_training(training)
        trackers = self._trackers()
        with _interruptions() as interrupted, closing(trackers):
            try:
                self._loop(training, stream, held_out, trackers, interrupted)
            except NotFiniteError as error:
                self._fall_back(training, str(error))
        self.measured["trained_parameters"] = training.trained_parameters
        self.measured["peak_bytes"] = peak_bytes(self.device)
        return training.trained_tensors()

    def _held_out(self) -> HeldOut | None:
        if self.options.perplexity is None:
            return None
        text = tokenize_text(self.options.perplexity, self.tokenizer, window_length=self.window_length)
        return HeldOut(text=text, window_length=self.window_length, draft=self.options.draft_weight is not None)

    def _check_enough(self) -> None:
        check_enough(
            self.options.data,
            self.tokenizer,
            tokens=self.settings.steps * self.settings.batch_tokens,
            epochs=self.options.epochs,
        )

    def _stream(self) -> TrainingStream:
        return TrainingStream(
            self.options.data,
            self.tokenizer,
            window_length=self.window_length,
            seed=self.options.seed,
            epochs=self.options.epochs,
        )

    def _prepare(self) -> Training:
        model = load_model(self.model, device="cpu")
        stored, dtype = stored_bytes(model), self.settings.dtype
        teacher = None if self.options.teacher is None else Teacher(self.options.teacher, model, dtype)
        prepare_training(model, self.options.train, self.lora_rank, self.options.seed)
        training = Training(model, self.settings, self.world, self.device, teacher)
        needed = stored + _CHECKPOINTS * _BYTES_PER_TRAINED * training.trained_parameters
        self.world.lead(lambda: check_space(self.out, needed))
        if teacher is not None:
            self.measured["teacher"] = {
                "shared_bytes": teacher.shared_bytes,
                "own_bytes": teacher.own_bytes,
                "blocks_run_once": teacher.shared_blocks,
            }
        return training

    def _trackers(self) -> Trackers:
        options = asdict(self.options)
        report_to = self.options.report_to if self.world.leads else None
        return Trackers(report_to, run=self.out.name, folder=self.out.parent / "logs", options=options)

    def _loop(
        self,
        training: Training,
        stream: TrainingStream,
        held_out: HeldOut | None,
        trackers: Trackers,
        interrupted: threading.Event,
    ) -> None:
        settings, start = self.settings, len(self.history)
        speed = Speed(training)
        batches = iterate(stream, settings.batch_windows, settings.steps - start)
        saved = start
        state = stream.state_dict()
        self.measured["tokens_per_second"] = 0.0
        with closing(batches):
            for step in self.track(range(start, settings.steps), "recovering", settings.steps - start):
                try:
                    windows, state = next(batches)
                except EndOfText as error:
                    self._save(training, step, saved, state)
                    raise InputError(f"{error}; --resume with more --epochs goes on after step {step}") from error
                with speed.timing(settings.batch_tokens):
                    values = training.step(step, windows)
                self.history.append(values)
                self.measured["tokens_per_second"] = speed.mean()
                done = step + 1
                values |= {"step": done, "tokens": done * settings.batch_tokens, **speed.read()}
                if held_out is not None and (done % self.eval_every == 0) and done < settings.steps:
                    try:
                        values["perplexity"] = held_out.perplexity_of_training(training)
                    except InputError as error:  # the text was fine before
                        raise NotFiniteError(f"the held-out perplexity after step {done} is not finite") from error
                trackers.log(values, done)
                if self.log is not None:
                    self.log(values, settings.steps)
                stop = self._agree(interrupted)
                if stop or done % self.options.save_every == 0 or done == settings.steps:
                    self._save(training, done, saved, state)
                    saved = done
                if stop and done < settings.steps:
                    raise InputError(f"interrupted after step {done} of {settings.steps}: --resume goes on from there")

    def _agree(self, interrupted: threading.Event) -> bool:
        """Whether any process was told to stop: all have to save together."""
        told = torch.tensor([float(interrupted.is_set())], device=self.device)
        return self.world.sum(told).item() > 0

    def _save(self, training: Training, done: int, saved: int, stream_state: dict[str, Any]) -> None:
        if done == saved:
            return
        state = training.state() | {
            "stream": stream_state,
            "history": self.history,
            "before": self.measured.get("before"),
        }
        self.folder.save(done, training.tensors(), state)

    def _restore(self, training: Training, step: int, stream: TrainingStream | None = None) -> None:
        tensors = training.tensors()
        state = self.folder.load(step, tensors)
        training.restore(tensors, state)
        self.history = state["history"]
        if state["before"] is not None:
            self.measured["before"] = state["before"]
        if stream is not None:
            stream.load_state_dict(state["stream"])

    def _fall_back(self, training: Training, reason: str) -> None:
        """Goes back to the newest checkpoint from which a finite step was taken."""
        advice = f"lower --lr (it was {self.settings.lr}), or raise --warmup"
        good = [step for step in self.folder.steps() if step < len(self.history)]
        if not good:
            self.folder.remove()
            raise InputError(f"{reason}, and no checkpoint was made before it: nothing was written; {advice}")
        self._restore(training, good[-1])
        self.stopped = f"{reason}: {self.out} holds the state after step {good[-1]}; {advice}"

    def finish(self, trained: dict[str, torch.Tensor], command: str | None) -> Record:
        """Merges what was trained into the model as it was, measures it, and writes it."""
        model = load_model(self.model, device="cpu")
        stored = model.dtype
        before = model_size(model)
        prepare_training(model, self.options.train, self.lora_rank, self.options.seed)
        model.load_state_dict(trained, strict=False)
        merge_lora(model)
        hold_in(model, stored)
        record = self._record(model, before)
        if command is not None:
            record["command"] = command
        write_checkpoint(self.out, model, record, source=self.model)
        self.folder.remove()
        return record

    def _record(self, model: PreTrainedModel, before: dict[str, int]) -> Record:
        settings = self.settings
        resolved = {
            "window_length": self.window_length,
            "batch_tokens": settings.batch_tokens,
            "micro_batch": settings.micro_batch,
            "lora_rank": self.lora_rank or None,
            "replica_lr": settings.lr * settings.replica_share if layout_of(model).bases else None,
            "precision": str(settings.dtype).removeprefix("torch."),
        }
        record = new_record(self.model, self.options, resolved)
        record |= {"compared": ["before", "after"], "before": before, "after": model_size(model)}
        held_out = self._held_out()
        if held_out is not None:
            measured = held_out.computed_in(model, settings.dtype, self.device, self.track)
            record["perplexity"] = {
                "text": self.options.perplexity,
                "before": self.measured["before"],
                "after": measured,
            }
        steps = len(self.history)
        record["recovery"] = {
            "tokens": steps * settings.batch_tokens,
            "steps": steps,
            "train": self.options.train,
            "processes": self.world.size,
            "history": self.history,
            **{name: value for name, value in self.measured.items() if name != "before"},
        }
        if self.stopped is not None:
            record["recovery"]["stopped"] = self.stopped
        if self.origin is not None:
            record["origin"] = self.origin
        return record


def _record_of(model: str) -> Record | None:
    """What is recorded beside a local or hub model's weights, if anything is."""
    file = find_file(model, RECORD)
    if file is None:
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}): get it again, or remove it") from error
    if not isinstance(record, dict):
        raise InputError(f"{file} holds no record: get it again, or remove it")
    return record


@contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """Within it the first Ctrl-C or SIGTERM is only noted, for the step to end well; the next one interrupts."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(*_: object) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
