"""What a flow was asked and what it measured: made, written, read back, shown as tables.

Read `record`, `tables`, `write`, then `read`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.record.read import Recorded, Size, fidelities, held_out, read_recorded
    from flexigpt.record.record import (
        Record,
        find_in,
        inspect_model,
        inspection_tables,
        measure_both,
        model_size,
        new_record,
    )
    from flexigpt.record.tables import (
        Rows,
        cost_table,
        evaluation_markdown,
        evaluation_notes,
        evaluation_rows,
        evaluation_table,
        markdown,
        notes,
        plan_rows,
        plan_table,
        removal_rows,
        result_tables,
        shown_name,
    )
    from flexigpt.record.write import (
        PLAN_PICTURE,
        check_evaluation_file,
        check_recordable,
        record_evaluation,
        write_checkpoint,
        write_evaluation,
        write_plan,
    )
else:
    lazy_door(__name__)
