"""Recovery: training a compact model back, or an ordinary one by the same loop. Can be killed and resumed."""

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flexigpt.model import all_tensors, fill_model, layout_of, stored_bytes
from flexigpt.record import (
    PLAN_PICTURE,
    Record,
    find_in,
    model_size,
    new_record,
    record_of,
    reserved,
    write_checkpoint,
)
from flexigpt.recovery.checkpoints import RunFolder
from flexigpt.recovery.estimate import lines_of
from flexigpt.recovery.measuring import HeldOut
from flexigpt.recovery.options import AUTO, RecoverOptions
from flexigpt.recovery.sweep import Sweep, steps_of_trial
from flexigpt.recovery.teacher import Teacher, check_teacher
from flexigpt.recovery.tracking import reported, tracker_classes
from flexigpt.recovery.trainable import USES_LORA, lora_rank_for, merge_lora, prepare_training, trained_in_words
from flexigpt.recovery.training import PRECISIONS, NotFiniteError, Settings, Training, hold_in, resolve_settings
from flexigpt.runtime import (
    InputError,
    Track,
    World,
    check_space,
    find_device,
    launched,
    on_signals,
    peak_bytes,
    processes,
    silent,
)
from flexigpt.text import (
    EndOfText,
    MixedStream,
    check_enough,
    check_tokenizer,
    check_window_length,
    iterate,
    shares_of,
    text_fingerprint,
    tokenize_text,
)
from flexigpt.weights import find_file, load_model, load_tokenizer, model_fingerprint, open_empty

# How often perplexity is measured in a run, and the options that another may have when it is resumed.
_EVALUATIONS = 10
_MAY_DIFFER = {"tokens", "epochs", "activation_checkpointing", "fsdp", "report_to", "device"}

# A checkpoint holds each trained parameter and AdamW's two averages in float32; there are two, and one being written.
_BYTES_PER_TRAINED, _CHECKPOINTS = 12, 3

Batches = Generator[tuple[torch.Tensor, dict[str, Any]], None, None]

# (what a step gave, steps of the run) or, for trackers, (the same, steps done)
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
    note: Callable[[str], None] | None = None,
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
        track: reports the progress of each stage.
        note: is told, before the first step, what is trained and what that takes.
        log: reports each step's loss, learning rate and speed, and each measured perplexity.

    Returns:
        The record, JSON-ready; None in all processes but the first. Where the loss ceased to be finite,
        record["recovery"]["stopped"] says so: `out` then holds the last good state.

    Raises:
        InputError: anything a user can put right; see the message.
    """
    out = Path(out).expanduser()
    inputs = (model, *shares_of(options.data), options.teacher, options.perplexity)
    tracker_classes(options.report_to)
    if options.fsdp and not launched():
        raise InputError(
            "--fsdp shards over processes, and there is one: start torchrun --nproc-per-node N -m flexigpt"
        )
    device = find_device(processes.local_device(options.device))
    with processes.joined_world(device) as world, ExitStack() as held:
        world.lead(lambda: held.enter_context(reserved(out, inputs, overwrite)))
        run = _Run(model, out, options, world, device)
        if world.leads:
            run.track, run.note, run.log = track, note, log
        world.lead(lambda: run.open_folder(resume, overwrite))
        trained = run.train(resume)
        processes.part()  # what follows is one process's work
        try:
            return run.finish(trained, command) if world.leads else None
        except KeyboardInterrupt:
            raise InputError(f"interrupted before {out} was written: --resume does what is left") from None


class _Run:
    """One recovery: what its options stand for, and its stages in order."""

    def __init__(self, model: str, out: Path, options: RecoverOptions, world: World, device: torch.device) -> None:
        self.model, self.out, self.options, self.world, self.device = model, out, options, world, device
        self.track: Track = silent
        self.note: Callable[[str], None] | None = None
        self.log: Log | None = None
        self.folder = RunFolder(out, world)
        # Filled in the end, when the model in training is in no state to be written.
        self.empty = open_empty(model)
        self.stored: dict[str, torch.Tensor] = {}
        self.tokenizer = load_tokenizer(model)
        check_tokenizer(model, self.tokenizer, self.empty.config)
        self.window_length = check_window_length(options.window_length, self.empty.config)
        if options.teacher is not None:
            check_teacher(options.teacher, self.empty, self.tokenizer, self.window_length)
        self.lora_rank = lora_rank_for(self.empty, options.lora_rank) if options.train in USES_LORA else 0
        self.origin, self.has_replicas = record_of(model), bool(layout_of(self.empty).bases)
        if options.train == "replicas" and not self.has_replicas:
            raise InputError("--train replicas trains nothing, since the model has no replicas: leave it out")
        if options.replica_lr is not None and not self.has_replicas:
            raise InputError("--replica-lr without effect, since the model has no replicas: leave it out")
        self.settings = self._settings_at()
        if options.lr == AUTO:
            steps_of_trial(self.settings.steps)
        self.eval_every = max(1, round(self.settings.steps / _EVALUATIONS))
        self.history: list[dict[str, float]] = []
        self.measured: dict[str, Any] = {}

    def _settings_at(self, lr: float | None = None) -> Settings:
        """Those of the whole run; at a rate in the place of auto."""
        of_model = {"replicas": self.has_replicas, "fitted": bool(find_in(self.origin or {}, "fitted"))}
        return resolve_settings(self.options, self.window_length, self.world, self.device, **of_model, lr=lr)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The text to measure on, where there is one."""
        if self.options.perplexity is None:
            return None
        text = tokenize_text(self.options.perplexity, self.tokenizer, window_length=self.window_length)
        return HeldOut(text=text, window_length=self.window_length, draft=bool(self.settings.draft_weight))

    def open_folder(self, resume: bool, overwrite: bool) -> None:
        """Makes sure that the run's folder holds this very run, or none."""
        if resume:
            self.folder.check(self._identity())
        elif (self.folder.steps() or self.folder.trials()) and not overwrite:
            there = f"{self.folder.path} holds an unfinished run"
            raise InputError(f"{there}: go on with --resume, or start again with --overwrite")
        elif self.folder.exists():
            self.folder.identity()

    @property
    def resolved(self) -> dict[str, Any]:
        """The options, with what their defaults stand for, and the rate that was found."""
        settings = self.settings
        return asdict(self.options) | {
            "window_length": self.window_length,
            "batch_tokens": settings.batch_tokens,
            "lora_rank": self.lora_rank or None,
            "lr": settings.lr,
            "replica_lr": settings.lr * settings.replica_share if self.has_replicas else None,
            "precision": next(name for name, dtype in PRECISIONS.items() if dtype is settings.dtype),
        }

    def _identity(self) -> dict[str, Any]:
        """All that the result depends on: what must be the same when a run is resumed."""
        asked = self.resolved
        if self.options.lr == AUTO:  # the rate is not found yet
            asked |= {name: getattr(self.options, name) for name in ("lr", "replica_lr")}
        found = {"model": model_fingerprint(self.model), "steps": self.settings.steps}
        found |= {name: value for name, value in asked.items() if name not in _MAY_DIFFER}
        found |= {name: text_fingerprint(asked[name]) for name in ("data", "perplexity") if asked[name]}
        return found | ({"teacher": model_fingerprint(asked["teacher"])} if asked["teacher"] else {})

    def train(self, resume: bool) -> dict[str, torch.Tensor]:
        """Loads, prepares and trains; returns what was trained, by name, on the CPU."""
        options, settings, held_out = self.options, self.settings, self.held_out
        if not resume:
            enough = {"tokens": settings.steps * settings.batch_tokens, "epochs": options.epochs}
            self.world.lead(lambda: check_enough(options.data, self.tokenizer, **enough))
        training = self._prepare()
        if not resume:
            self.folder.start(self._identity())
        if options.lr == AUTO:
            self._find_rate(training)
        stream = self._stream()
        if resume and self.folder.steps():
            stream.load_state_dict(self._restore(training, self.folder.steps()[-1]))
        if held_out is not None and "before" not in self.measured:
            self.measured["before"] = held_out.of_training(training)
        report_to = options.report_to if self.world.leads else None
        curves = reported(report_to, run=self.out.name, folder=self.out.parent / "logs", options=asdict(options))
        with _interruptions() as interrupted, curves as report:
            try:
                self._loop(training, stream, report, interrupted)
            except NotFiniteError as error:
                self._fall_back(training, str(error))
        self.measured |= {"trained_parameters": training.trained_parameters, "peak_bytes": peak_bytes(self.device)}
        self.measured["micro_batch"] = training.settings.micro_batch
        return training.trained_tensors()

    def _stream(self) -> MixedStream:
        options = self.options
        given = {"window_length": self.window_length, "seed": options.seed, "epochs": options.epochs}
        return MixedStream(options.data, self.tokenizer, **given)

    def _batches(self, count: int) -> Batches:
        """So many from the beginning of the text."""
        return iterate(self._stream(), self.settings.batch_windows, count)

    def _find_rate(self, training: Training) -> None:
        """Tries rates, those that a run before this one has tried left out, and takes the best."""

        with _interruptions() as interrupted:
            sweep = Sweep(training, self._settings_at, self._batches, self.folder, interrupted)
            trials = sweep.find(self.track, self.note or (lambda _: None))
        self.settings = self._settings_at(training.settings.lr)
        told = [trial | {"steps": len(trial["losses"])} for trial in trials]
        self.measured["trials"] = [{name: one[name] for name in ("lr", "loss", "steps")} for one in told]

    def _prepare(self) -> Training:
        model = load_model(self.model, device="cpu")
        if self.world.leads:  # what training moves, casts or wraps stays here as it was read
            self.stored = all_tensors(model)
            self.empty.generation_config = model.generation_config
        stored, dtype = stored_bytes(model), self.settings.dtype
        teacher = None if self.options.teacher is None else Teacher(self.options.teacher, model, dtype)
        prepare_training(model, self.options.train, self.lora_rank, self.options.seed)
        training = Training(model, self.settings, self.world, self.device, teacher)
        needed = stored + _CHECKPOINTS * _BYTES_PER_TRAINED * training.trained_parameters
        self.world.lead(lambda: check_space(self.out, needed))
        training.fit_memory()
        self.measured["trained"] = trained_in_words(self.options.train, self.lora_rank, self.has_replicas)
        if self.note is not None:
            for line in lines_of(training, self.measured["trained"], stored):
                self.note(line)
        if teacher is not None:
            sizes = ("shared_bytes", "own_bytes", "blocks_run_once")
            self.measured["teacher"] = {name: getattr(teacher, name) for name in sizes}
        return training

    def _loop(self, training: Training, stream: MixedStream, report: Log, interrupted: threading.Event) -> None:
        settings, start, seconds = self.settings, len(self.history), 0.0
        batches = iterate(stream, settings.batch_windows, settings.steps - start)
        saved, state = start, stream.state_dict()
        self.measured["tokens_per_second"] = 0.0
        with closing(batches):
            for step in self.track(range(start, settings.steps), "recovering", settings.steps - start):
                try:
                    windows, state = next(batches)
                except EndOfText as error:
                    if step > saved:
                        self._save(training, step, state)
                    raise InputError(f"{error}; --resume with more --epochs goes on after step {step}") from error
                done, began = step + 1, time.perf_counter()
                values = training.step(step, windows)
                took = time.perf_counter() - began
                seconds += took
                self.measured["tokens_per_second"] = (done - start) * settings.batch_tokens / seconds
                values |= {"step": done, "tokens": done * settings.batch_tokens}
                values["tokens_per_second"] = settings.batch_tokens / took
                self.history.append(values)
                if done % self.eval_every == 0 and done < settings.steps:
                    self._measure(training, values)
                report(values, done)
                if self.log is not None:
                    self.log(values, settings.steps)
                # Where any process is to stop, or finds a checkpoint due, all have to save together.
                told = torch.tensor([interrupted.is_set(), self.folder.is_due()], device=self.device).float()
                stop, due = self.world.sum(told).tolist()
                if stop or due or done == settings.steps:
                    self._save(training, done, state)
                    saved = done
                if stop and done < settings.steps:
                    raise InputError(f"interrupted after step {done} of {settings.steps}: --resume goes on from there")

    def _measure(self, training: Training, values: dict[str, float]) -> None:
        if self.held_out is None:
            return
        try:
            values["perplexity"] = self.held_out.perplexity_of_training(training)
        except InputError as error:  # the text was fine before
            raise NotFiniteError(f"the held-out perplexity after step {values['step']} is not finite") from error

    def _save(self, training: Training, done: int, place: dict[str, Any]) -> None:
        state = {"stream": place, "history": self.history, "before": self.measured.get("before")}
        self.folder.save(done, training.tensors(), training.state() | state)

    def _restore(self, training: Training, step: int) -> dict[str, Any]:
        """Takes over a checkpoint; returns its place in the text."""
        tensors = training.tensors()
        state = self.folder.load(step, tensors)
        training.restore(tensors, state)
        self.history = state["history"]
        if state["before"] is not None:
            self.measured["before"] = state["before"]
        place: dict[str, Any] = state["stream"]
        return place

    def _fall_back(self, training: Training, reason: str) -> None:
        """Goes back to the newest checkpoint from which a finite step was taken."""
        advice = f"lower --lr (it was {self.settings.lr})"
        good = [step for step in self.folder.steps() if step < len(self.history)]
        if not good:
            self.folder.remove()
            raise InputError(f"{reason}, and no checkpoint was made before it: nothing was written; {advice}")
        self._restore(training, good[-1])
        self.measured["stopped"] = f"{reason}: {self.out} holds the state after step {good[-1]}; {advice}"

    def finish(self, trained: dict[str, torch.Tensor], command: str | None) -> Record:
        """Merges what was trained into the model as it was, measures it, and writes it."""
        model, stored = self.empty, self.empty.dtype
        fill_model(model, self.stored)
        before = model_size(model)
        prepare_training(model, self.options.train, self.lora_rank, self.options.seed)
        model.load_state_dict(trained, strict=False)
        merge_lora(model)
        hold_in(model, stored)
        record = self._record(model, before) | ({} if command is None else {"command": command})
        picture = find_file(self.model, PLAN_PICTURE)  # the plan is the same
        extras = {} if picture is None else {PLAN_PICTURE: picture.read_bytes()}
        write_checkpoint(self.out, model, record, source=self.model, extras=extras)
        self.folder.remove()
        return record

    def _record(self, model: PreTrainedModel, before: dict[str, int]) -> Record:
        record = new_record(self.model, self.options, self.resolved)
        record |= {"compared": ["before", "after"], "before": before, "after": model_size(model)}
        if self.held_out is not None:
            record["perplexity"] = {
                "text": self.options.perplexity,
                "before": self.measured["before"],
                "after": self.held_out.computed_in(model, self.settings.dtype, self.device, self.track),
            }
        steps = len(self.history)
        record["recovery"] = {
            "tokens": steps * self.settings.batch_tokens,
            "steps": steps,
            "train": self.options.train,
            "processes": self.world.size,
            "history": self.history,
            **{name: value for name, value in self.measured.items() if name != "before"},
        }
        return record | ({} if self.origin is None else {"origin": self.origin})


@contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """Within it the first Ctrl-C or SIGTERM is only noted, for the step to end well; the next one interrupts."""
    noted = threading.Event()

    def note() -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    with on_signals(note, signal.SIGINT, signal.SIGTERM):
        yield noted
