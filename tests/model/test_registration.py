"""transformers knows compact models once flexigpt is imported, whichever of the two comes first."""

import subprocess
import sys

import pytest

KNOWN = """
import flexigpt
from transformers import AutoConfig, AutoModelForCausalLM
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16}
config = AutoConfig.for_model("flexigpt", text_config={"model_type": "llama", **sizes})
model = AutoModelForCausalLM.from_config(config)
assert (type(config), type(model)) == (flexigpt.FlexiGPTConfig, flexigpt.FlexiGPTForCausalLM)
"""


@pytest.mark.parametrize(
    "before",
    [
        "import flexigpt",
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig",  # the other automatic class is loaded after flexigpt
        "import flexigpt; flexigpt.FlexiGPTForCausalLM",  # ours are loaded before the automatic classes are asked for
        "import flexigpt.model.configuration_flexigpt",
    ],
)
def test_in_whichever_order_they_are_imported(before: str) -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-c", f"{before}\n{KNOWN}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_nothing_of_transformers_is_loaded_for_it() -> None:
    code = "import sys, flexigpt; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
