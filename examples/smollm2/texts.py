"""Texts of two kinds for the race on a real model: novels, and technical prose and code.

python examples/smollm2/texts.py out/smollm2-texts

Writes calibration.jsonl and recovery.jsonl, both kinds in equal shares, and novels.jsonl and technical.jsonl to measure
on, which share no document with the other two. Novels are those of examples/novel16; technical text is the language
reference and the standard library of the Python that runs this, so another version of Python gives other texts.
"""

import json
import random
import sys
import sysconfig
from pathlib import Path
from pydoc_data import topics

import pyarrow.parquet

NOVELS = Path(__file__).parents[1] / "novel16"
PIECE = 4000  # characters
CALIBRATION, RECOVERY, HELD_OUT = 100, 300, 30  # pieces of each kind


def technical() -> list[str]:
    """Documents: topics of the language reference, and modules of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = sorted([*library.glob("*.py"), *library.glob("asyncio/*.py"), *library.glob("email/*.py")])
    modules = [path.read_text(encoding="utf-8", errors="ignore") for path in names]
    return [text for text in (*topics.topics.values(), *modules) if len(text) >= PIECE // 2]


def novels() -> list[str]:
    """Documents: chapters, those to measure on first."""
    held = [json.loads(line)["text"] for line in (NOVELS / "validation.jsonl").read_text("utf-8").splitlines()]
    other = [json.loads(line)["text"] for line in (NOVELS / "calibration.jsonl").read_text("utf-8").splitlines()]
    rows = pyarrow.parquet.read_table(NOVELS / "recovery.parquet", columns=["text"]).to_pylist()
    return [*held, *other, *(row["text"] for row in rows)]


def pieces(documents: list[str], count: int) -> list[str]:
    """So many pieces of all documents, drawn at random."""
    cut = [text[start : start + PIECE] for text in documents for start in range(0, len(text), PIECE)]
    return random.Random(0).sample([piece for piece in cut if len(piece) >= PIECE // 2], count)


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    random_order = random.Random(0)
    chapters, documents = novels(), technical()
    num_held = len((NOVELS / "validation.jsonl").read_text("utf-8").splitlines())
    random_order.shuffle(documents)
    held = {"novels": chapters[:num_held], "technical": documents[: len(documents) // 5]}
    other = {"novels": chapters[num_held:], "technical": documents[len(documents) // 5 :]}
    mixed: dict[str, list[str]] = {"calibration": [], "recovery": []}
    for kind, texts in other.items():
        write(out / f"{kind}.jsonl", pieces(held[kind], HELD_OUT))
        found = pieces(texts, CALIBRATION + RECOVERY)
        mixed["calibration"] += found[:CALIBRATION]
        mixed["recovery"] += found[CALIBRATION:]
    for name, texts in mixed.items():
        random_order.shuffle(texts)
        write(out / f"{name}.jsonl", texts)


if __name__ == "__main__":
    main()
