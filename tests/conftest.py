import os

# Before any library reads them: no test may wait for a network, and tiny tensors only lose by more threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import tiny_config
from flexigpt import PruneOptions, prune, write_checkpoint
from flexigpt.cli.main import main
from flexigpt.recovery import checkpoints, head
from forks import BENEATH, Forks, forking
from talking import TEMPLATE

EXAMPLE = Path(__file__).parents[1] / "examples" / "novel16"
COLLECTED = pytest.StashKey[list[str]]()

# Whole files go to the processes of `make test`. Those that take longest begin first, the longest of them at once: one
# that began last would have its process work alone.
LONGEST = (
    *("test_docs.py", "recovery/test_distributed.py", "pruning/test_frontier.py", "pruning/test_units.py"),
    *("recovery/test_recover.py", "decoding/test_speculate.py", "evaluation/test_tasks.py", "test_suite.py"),
    *("decoding/test_benchmark.py", "decoding/test_sample.py", "cli/test_cli.py", "model/test_compile.py"),
    *("recovery/test_told_memory.py", "model/test_registration.py", "model/test_devices.py"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    config.stash[COLLECTED] = [item.nodeid for item in items]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tests measure is kept among themselves."""
    os.environ["FLEXIGPT_CACHE"] = str(tmp_path_factory.mktemp("own-cache"))


@pytest.fixture(scope="session")
def example() -> Path:
    """The shipped model and its texts."""
    return EXAMPLE


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny LLaMA (6 blocks, float32) with the shipped model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "source"
    config = tiny_config("llama-gqa")
    config.vocab_size = 4096
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 20,000 characters of the shipped validation text, in 10 documents."""
    rows = (EXAMPLE / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": json.loads(row)["text"][:2000]}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8,000 characters of the shipped validation text as one document, so that nothing is shuffled."""
    rows = (EXAMPLE / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("single") / "text.txt"
    path.write_text(json.loads(max(rows, key=len))["text"][:8000])
    return path


@pytest.fixture(scope="session")
def tiny_compact(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA with blocks 2 and 4 pruned."""
    folder = tmp_path_factory.mktemp("tiny") / "compact"
    model, _, record = prune(str(tiny_source), PruneOptions.paper(blocks=(2, 4), rank=4))
    write_checkpoint(folder, model, record, source=str(tiny_source))
    return folder


@pytest.fixture(scope="session")
def talker(tiny_compact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny compact model, whose tokenizer has a chat template: the one in `talking`."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(tiny_compact, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def forks(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs programs that find everything imported."""
    with forking(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture(scope="session")
def early_forks(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs programs that find nothing imported of transformers, PEFT, hub and flexigpt, but all beneath them."""
    with forking(tmp_path_factory.mktemp("early-forks"), BENEATH) as started:
        yield started


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery saves after every step, in a longer run after every five minutes."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)


Hooked = Callable[..., dict[str, str]]
HOOK = """
import fnmatch, os, resource, signal, sys
{before}

def hook(event, arguments):
    names = [os.fspath(argument) for argument in arguments if isinstance(argument, str | os.PathLike)]
    if event == {event!r} and any(fnmatch.fnmatch(name, {pattern!r}) for name in names):
        {action}

sys.addaudithook(hook)
"""


@pytest.fixture
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Hooked:
    """The environment of a command to which something happens at an audit event that names something, and before it."""

    def environment(event: str, pattern: str, action: str, before: str = "") -> dict[str, str]:
        folder = tmp_path_factory.mktemp("hooked")
        (folder / "sitecustomize.py").write_text(
            HOOK.format(event=event, pattern=pattern, action=action, before=before)
        )
        path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {"PYTHONPATH": os.pathsep.join(path)}

    return environment


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return command


@pytest.fixture
def few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training logits of 13 tokens exist at a time, which divides none of the tests' batches."""
    monkeypatch.setattr(head, "_LEAST_TOKENS", 13)
    monkeypatch.setitem(head._CHUNK_BUDGET, "cpu", 1)
