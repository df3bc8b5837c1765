"""TRL trains compact models, whole or by a LoRA, and what it writes opens again. Skipped where trl is not installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

trl = pytest.importorskip("trl")

from flexigpt import FlexiGPTForCausalLM  # noqa: E402 - after the skip

pytestmark = pytest.mark.filterwarnings("ignore")  # of trl's own calls

SENTENCES = ["It was a dark night.", "She went home.", "The door was open, and nobody came.", "He said nothing."]


def trainer_of(kind: str, model: Any, folder: Path, peft_config: LoraConfig | None) -> Any:
    common = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 32,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(model)
    if kind == "sft":
        args, data = trl.SFTConfig(**common), Dataset.from_dict({"text": SENTENCES})
        trainer = trl.SFTTrainer
    else:
        pairs = {"prompt": ["And then"] * 4, "chosen": SENTENCES, "rejected": SENTENCES[::-1]}
        args, data = trl.DPOConfig(**common), Dataset.from_dict(pairs)
        trainer = trl.DPOTrainer
    return trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_three_steps_saved_and_opened_again(kind: str, adapted: bool, tiny_compact: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM") if adapted else None
    trainer = trainer_of(kind, str(tiny_compact), tmp_path, config)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    source = AutoModelForCausalLM.from_pretrained(tiny_compact)
    before = logits(source, ids)
    torch.testing.assert_close(logits(trainer.model, ids), before)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)
    after = logits(trainer.model, ids)
    assert not torch.allclose(after, before)
    trainer.save_model()
    opened = PeftModel.from_pretrained(source, tmp_path) if adapted else AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(opened.get_base_model() if adapted else opened, FlexiGPTForCausalLM)
    torch.testing.assert_close(logits(opened, ids), after)
