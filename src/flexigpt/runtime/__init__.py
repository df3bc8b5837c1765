"""What every flow runs on: errors, units, files, cache, progress, machine, processes.

Nothing of flexigpt's own is imported here. Read `errors`, `files`, `cache` and `progress` first; `processes` only for
training on several devices.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.runtime.cache import Cache, CachedStage, default_folder
    from flexigpt.runtime.errors import InputError, check_seed, flag, one_line
    from flexigpt.runtime.files import (
        RECORD,
        check_output,
        check_space,
        digest,
        existing_parent,
        fingerprint,
        replace_file,
        replaced_folder,
    )
    from flexigpt.runtime.machine import check_dtype, device_name, find_device, peak_bytes
    from flexigpt.runtime.options import RunOptions, check_options, choices_of, option
    from flexigpt.runtime.processes import (
        ALONE,
        World,
        joined_world,
        launched,
        launched_rank,
        local_device,
        part,
        reduced,
        replicate,
        shard,
        tells,
        whole,
    )
    from flexigpt.runtime.progress import T, Timed, Track, in_parallel, silent, workers_of
    from flexigpt.runtime.units import megabytes, parse_share, parse_size, parse_tokens
else:
    lazy_door(__name__)
