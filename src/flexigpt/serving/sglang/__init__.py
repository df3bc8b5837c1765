"""What SGLang loads when `SGLANG_EXTERNAL_MODEL_PACKAGE` names this package: a class by its `EntryClass`."""
