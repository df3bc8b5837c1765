"""Text -> tokens -> windows and training batches.

In: FILE, FOLDER or the NAME of a data set, with #COLUMN where the text is not in the column `text`, or several of them
with their shares; conversations are written as the tokenizer's chat template does. Out: windows of token ids, (windows,
tokens) int64. Read `names`, `windows` (calibration and perplexity), then `batches` (the training stream).
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.text.batches import EndOfText, MixedStream, TrainingStream, check_enough, iterate
    from flexigpt.text.conversations import Conversation, render
    from flexigpt.text.names import TextNames, local_files, shares_of, shown_texts, text_fingerprint
    from flexigpt.text.windows import (
        Documents,
        TokenizedText,
        batch_size_for,
        calibration_windows,
        check_tokenizer,
        check_window_length,
        tokenize_text,
        window_batches,
    )
else:
    lazy_door(__name__)
