"""Text -> tokens -> windows and training batches.

In: a file, a folder of files, or a data set's name. Out: windows of token ids, (windows, tokens) int64. Read `windows`
(calibration and perplexity), then `batches` (the training stream).
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.text.batches import EndOfText, TrainingStream, check_enough, iterate, text_fingerprint
    from flexigpt.text.windows import (
        DEFAULT_TEXT,
        TokenizedText,
        batch_size_for,
        calibration_windows,
        check_window_length,
        tokenize_text,
        window_batches,
    )
else:
    lazy_door(__name__)
