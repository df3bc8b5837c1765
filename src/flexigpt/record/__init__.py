"""What a flow was asked and what it measured: made, written, read back, shown as tables.

Read `record`, `tables`, `read`, `card`, `write`, then `verdict`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.record.card import Picture, write_card
    from flexigpt.record.read import Recorded, Size, fidelities, held_out, read_record, read_recorded, record_of
    from flexigpt.record.record import (
        RECORD,
        Record,
        find_in,
        inspect_model,
        measure_both,
        model_size,
        new_record,
    )
    from flexigpt.record.tables import (
        Rows,
        cost_rows,
        evaluation_rows,
        frontier_rows,
        frontier_series,
        inspection_rows,
        notes,
        plan_rows,
        removal_rows,
        result_rows,
        shown_name,
    )
    from flexigpt.record.verdict import verdict
    from flexigpt.record.write import (
        FIGURES,
        GENERATOR,
        PLAN_PICTURE,
        check_recordable,
        is_report,
        record_evaluation,
        reserved,
        write_checkpoint,
        write_frontier,
        write_plan,
        write_record,
    )
else:
    lazy_door(__name__)
