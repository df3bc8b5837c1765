"""Text -> tokens -> windows and training batches.

In: FILE, FOLDER or the NAME of a data set, with #COLUMN where the text is not in the column `text`. Out: windows of
token ids, (windows, tokens) int64. Read `windows` (calibration and perplexity), then `batches` (the training stream).
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.text.batches import EndOfText, TrainingStream, check_enough, iterate
    from flexigpt.text.windows import (
        TokenizedText,
        batch_size_for,
        calibration_windows,
        check_tokenizer,
        check_window_length,
        text_fingerprint,
        tokenize_text,
        window_batches,
    )
else:
    lazy_door(__name__)
