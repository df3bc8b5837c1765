"""Models on disk: opened, read block by block, written.

In: a folder or a hub name. Out: a model in memory, or one of which only the blocks in use are there. Read `open`,
`files`, `sources`, then `shards`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.weights.eight_bits import EightBits, int8
    from flexigpt.weights.files import find_file, names_in_files, open_weights
    from flexigpt.weights.open import (
        check_quantiser,
        has_replicas,
        load_model,
        load_tokenizer,
        model_fingerprint,
        move,
        open_checked,
        open_empty,
        read_config,
        travelling,
    )
    from flexigpt.weights.quantised import quantised_parts
    from flexigpt.weights.shards import Piece, Reader, write_shards
    from flexigpt.weights.sources import (
        Assembly,
        Source,
        StreamedModel,
        check_finite,
        exchange_parameters,
        without_blocks,
    )
else:
    lazy_door(__name__)
