"""What every flow runs on: errors, units, files, cache, progress, machine, processes.

Nothing of flexigpt's own is imported here. Read `errors`, `files`, `cache` and `progress` first. `processes`, for
training on several devices, is the one file that others take as a whole: `from flexigpt.runtime import processes`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.runtime.cache import Cache, CachedStage, default_folder
    from flexigpt.runtime.errors import InputError, flag, one_line
    from flexigpt.runtime.files import (
        check_output,
        check_space,
        claimed,
        digest,
        existing_parent,
        file_digest,
        fingerprint,
        local_path,
        read_sealed,
        replace_file,
        replace_sealed,
        replaced_file,
        replaced_folder,
        unique_names,
    )
    from flexigpt.runtime.launch import launched, launched_rank, on_signals
    from flexigpt.runtime.machine import (
        check_dtype,
        device_name,
        find_device,
        machine_lines,
        peak_bytes,
        return_memory,
        slow_half,
        versions,
        widened_rows,
    )
    from flexigpt.runtime.options import RunOptions, check_options, choices_of, option
    from flexigpt.runtime.processes import ALONE, World
    from flexigpt.runtime.progress import T, Timed, Track, bars, in_parallel, silent, workers_of
    from flexigpt.runtime.units import megabytes, parse_numbers, parse_share, parse_size, parse_tokens, size_in_words
else:
    lazy_door(__name__)
