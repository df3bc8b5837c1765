"""A chat template, and what stock transformers answers."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

_MESSAGES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE = _MESSAGES + "{% if add_generation_prompt %}assistant:{% endif %}"


def expected(folder: Path, text: str, tokens: int) -> str:
    """What stock transformers continue that text with."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=2)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
