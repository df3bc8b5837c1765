"""Quantised checkpoints: which tensors in the files a parameter consists of."""

import re
from collections.abc import Mapping

from transformers import PreTrainedModel

from flexigpt.runtime import InputError
from flexigpt.weights.files import StoredTensor, WeightFiles

# Numbers, scales and zero points of torchao; what bitsandbytes knows of a weight beside its numbers.
_PARTS = re.compile(r"\._weight_\w+$|\.weight\..+$")


def quantised_parts(weights: WeightFiles, model: PreTrainedModel) -> Mapping[str, list[StoredTensor]]:
    """Parameter of a quantised model (the meta device will do) -> the tensors in the files that it consists of.

    Raises:
        InputError: parameters that are missing, which transformers would make up, or more than the model has.
    """
    found: dict[str, list[StoredTensor]] = {}
    for name, tensor in weights.tensors.items():
        found.setdefault(_PARTS.sub(".weight", name), []).append(tensor)
    state, ties = model.state_dict(), model.get_expanded_tied_weights_keys(all_submodels=True)
    lacking = sorted(state.keys() - found.keys() - ties.keys())
    left = sorted(found.keys() - state.keys())
    if lacking or left:
        what = f"lack {lacking[0]}" if lacking else f"hold {left[0]}, for which config.json has no place"
        raise InputError(f"the quantised weights of {weights.source} {what}: quantise the model again")
    return found
