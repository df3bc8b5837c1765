"""A small OPT with random weights and novel16's tokenizer, for recipes to train: python recipes/small_opt.py OUT"""

import json
import sys

import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from flexigpt.runtime import RECORD, replaced_folder

TOKENIZER = "examples/novel16"


def main(out: str) -> None:
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
    with replaced_folder(out) as folder:
        OPTForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps({"source_name": "random weights"}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
