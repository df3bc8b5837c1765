"""transformers knows compact models once flexigpt is imported, whichever of the two comes first."""

import subprocess
import sys

import pytest

from forks import Forks

NEW = "import sys; assert not {'flexigpt', 'huggingface_hub', 'peft', 'transformers'} & sys.modules.keys()"
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
def test_in_whichever_order_they_are_imported(before: str, early_forks: Forks) -> None:
    strict = "import warnings; warnings.simplefilter('error', UserWarning)"
    ran = early_forks.run("-c", f"{NEW}\n{strict}\n{before}\n{KNOWN}")
    assert ran.returncode == 0, ran.stderr


TAUGHT = """
import peft
from transformers import AutoModelForCausalLM
rows = [{"block": 1, "base": 0, "rank": 1}]
config = flexigpt.FlexiGPTConfig(
    text_config={"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "vocab_size": 16},
    replicas=rows, blocks="model.layers", linears=["self_attn.q_proj"], output_norms=[],
)
peft.get_peft_model(flexigpt.FlexiGPTForCausalLM(config), peft.LoraConfig(target_modules=["q_proj"]))
"""


@pytest.mark.parametrize("before", ["", "import peft", "import importlib.util; importlib.util.find_spec('peft')"])
@pytest.mark.parametrize("after", ["", "importlib.util.find_spec('peft')"])
def test_peft_knows_replicas_whoever_looked_for_it_before(before: str, after: str, early_forks: Forks) -> None:
    """transformers looks whether PEFT is there, and loads it later, or not at all."""
    ran = early_forks.run("-c", f"{NEW}\n{before}\nimport importlib.util, flexigpt\n{after}\n{TAUGHT}")
    assert ran.returncode == 0, ran.stderr


def test_nothing_of_transformers_is_loaded_for_it() -> None:
    code = "import sys, flexigpt; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
