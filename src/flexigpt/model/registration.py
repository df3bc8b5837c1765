"""Tells transformers and PEFT of compact models without loading them: `import flexigpt` is all that a user needs.

What is loaded already hears of our classes now; what is not, right after it is loaded.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# Their module -> ours that it is to know.
_PAIRS = {
    "transformers.models.auto.configuration_auto": "flexigpt.model.configuration_flexigpt",
    "transformers.models.auto.modeling_auto": "flexigpt.model.modeling_flexigpt",
    "peft": "flexigpt.model.peft_layers",
}


class _Hook(MetaPathFinder):
    """Finds the modules above once each, by the finders behind it, and hears when they are loaded."""

    def __init__(self) -> None:
        self._unseen = {*_PAIRS, *_PAIRS.values()}
        self._sought: set[str] = set()
        self._loaded: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._unseen or fullname in self._sought:
            return None
        self._sought.add(fullname)  # the search comes back here
        try:
            spec = find_spec(fullname)
        finally:
            self._sought.discard(fullname)  # who looks whether it is there need not load it
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.loaded(fullname)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def loaded(self, name: str) -> None:
        """Registers what `name` completes. Ours is loaded for it, unless it is being loaded and will come here."""
        self._loaded.add(name)
        self._unseen.discard(name)
        for theirs, ours in _PAIRS.items():
            if name not in (theirs, ours) or theirs not in self._loaded:
                continue
            if ours not in self._loaded:
                if ours not in sys.modules:
                    import_module(ours)
            else:
                _introduce(import_module(theirs), import_module(ours))


def _introduce(theirs: ModuleType, ours: ModuleType) -> None:
    """Both are loaded."""
    if hasattr(theirs, "AutoConfig"):
        theirs.AutoConfig.register(ours.FlexiGPTConfig.model_type, ours.FlexiGPTConfig)
    elif hasattr(theirs, "AutoModelForCausalLM"):
        for one in (ours.FlexiGPTModel, ours.FlexiGPTForCausalLM, ours.FlexiGPTForSequenceClassification):
            getattr(theirs, one._auto_class).register(ours.FlexiGPTConfig, one)
    else:
        ours.teach()


def register_when_imported() -> None:
    """Tells transformers' automatic classes and PEFT of the compact model's, now or when they are loaded."""
    hook = _Hook()
    sys.meta_path.insert(0, hook)
    for name in _PAIRS:
        if name in sys.modules:
            hook.loaded(name)
