"""A small OPT with random weights and novel16's tokenizer, for recipes to train: python recipes/small_opt.py OUT"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from flexigpt.runtime import versions

TOKENIZER = "examples/novel16"


def main(out: Path) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=4096,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_hidden_layers=10,
        num_attention_heads=4,
        max_position_embeddings=256,
        dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    part = out.with_suffix(".part")
    OPTForCausalLM(config).save_pretrained(part)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(part)
    record = {"source_name": "random weights", "versions": versions(), "options": {}}
    (part / "record.json").write_text(json.dumps(record), encoding="utf-8")
    part.rename(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
