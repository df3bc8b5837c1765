"""The model card of a checkpoint."""

import re
from pathlib import Path

from transformers import PreTrainedConfig

from flexigpt.checkpoint import plan_of
from flexigpt.configuration_flexigpt import FlexiGPTConfig
from flexigpt.evaluate import Evaluation
from flexigpt.evaluation_tables import evaluation_markdown
from flexigpt.record import Record, find_in
from flexigpt.tables import block_rows, cost_rows, markdown, notes, plan_in_words, replica_parts, shown_name

PLAN_PICTURE = "plan.png"  # lies beside a compact model's card


def model_card(config: PreTrainedConfig, record: Record) -> str:
    """The README.md of a checkpoint: what it is, measured numbers, how to open it, its blocks, how it was made."""
    ran = record.get("command")
    made = (
        f"Made with:\n\n```bash\n{ran}\n```\n" if ran else "Made with the Python API; `record.json` has the options.\n"
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    measured = "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in notes(record))
    name, is_local = shown_name(record["source_name"]), Path(record["source_name"]).exists()
    base_model = "" if is_local else f"base_model: {name}\n"
    title, summary, trust, hint = _card_words(config, record)
    rows = block_rows(config, record)
    picture = ""
    if isinstance(config, FlexiGPTConfig):
        picture = f"![{plan_in_words(plan_of(config))}]({PLAN_PICTURE})\n\n"
    blocks = "" if rows is None else f"## Blocks\n\n{picture}{markdown(*rows)}\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- flexigpt
---

# {name.rpartition("/")[2]}, {title}

{summary}

{markdown(*cost_rows(record))}{measured}
## Open it

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("."{trust})
```

{hint}

{blocks}## Origin

{made}
Source: {name}. Versions: {versions}. All that was measured is in `record.json`.
"""


def with_evaluation(card: str, evaluation: Evaluation) -> str:
    """The card with what an evaluation says, in place of what one said before; all else in it stays."""
    section = f"## Evaluation\n\n{evaluation_markdown(evaluation)}\n"
    rest = re.sub(r"^## Evaluation\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    before, origin, after = rest.partition("## Origin\n")
    return f"{before}{section}{origin}{after}" if origin else f"{rest.rstrip()}\n\n{section}".lstrip()


def _card_words(config: PreTrainedConfig, record: Record) -> tuple[str, str, str, str]:
    """What a model card says of its kind of model: in the title, below it, in the snippet, and after the snippet."""
    if isinstance(config, FlexiGPTConfig):
        plan, parts = plan_of(config), " and ".join(("low-rank adapters", *replica_parts(config)))
        summary = (
            f"{len(plan.replicas)} of {plan.num_blocks} blocks are replicas: each borrows the linears of a kept block, "
            f"its base, and\nadds {parts} of its own\n([FlexiGPT](https://arxiv.org/abs/2501.14713)). "
            "Every tensor is stored once."
        )
        hint = "With `import flexigpt` first, `trust_remote_code` is not needed."
        return "compact", summary, ", trust_remote_code=True", hint
    hint = f"An ordinary checkpoint of the `{config.model_type}` family: transformers is all that it needs."
    removed = find_in(record, "removed")
    if removed is None:
        return "trained", f"All {config.num_hidden_layers} blocks are kept.", "", hint
    summary = (
        f"{len(removed['blocks'])} of {removed['num_blocks']} blocks of {shown_name(removed['source'])} are removed, "
        "and nothing stands in for them\n(plain removal, [ShortGPT](https://arxiv.org/abs/2403.03853))."
    )
    return "shorter", summary, "", hint
