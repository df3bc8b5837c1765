"""What a compact model is: its plan, the families it can be made of, its modules, where its parts lie.

`configuration_flexigpt` and `modeling_flexigpt` travel with every checkpoint: they import torch, transformers and each
other, nothing else. Read `plan`, those two, `architecture`, `layout`, `run`, then `build`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.model.architecture import ARCHITECTURES, find_architecture, num_blocks, quantised_by, weight_matrix
    from flexigpt.model.build import (
        all_tensors,
        check_depth,
        config_dtype,
        config_with_width,
        empty_compact,
        empty_model,
        empty_of_blocks,
        fill_model,
        materialize,
    )
    from flexigpt.model.configuration_flexigpt import FlexiGPTConfig
    from flexigpt.model.layout import (
        INNER,
        OUTPUT_NORM,
        REPLICA_PARTS,
        SOURCE_PREFIX,
        count_blocks,
        count_parts,
        layout_of,
        mlp_widths,
        model_shape,
        parameter_bytes,
        plan_of,
        source_units,
        stored_bytes,
        stored_tensors,
        sublayer_paths,
    )
    from flexigpt.model.modeling_flexigpt import (
        CACHE_NAMES,
        FlexiGPTForCausalLM,
        NormedOutput,
        SharedLinear,
        cache_name,
        linear_size,
        right_on_cpus,
    )
    from flexigpt.model.plan import (
        ModelShape,
        Plan,
        Replica,
        SublayerReplica,
        default_rank,
        plan_in_words,
        plan_summary,
    )
    from flexigpt.model.run import HELD_BYTES, Widened, block_output, fast_half, held_back, replaced_forwards, watched
else:
    lazy_door(__name__)
