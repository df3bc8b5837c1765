"""Records -> figures and one HTML page that needs nothing else.

Read `report`, `page`, then `stack`, `figures`, `result_figures` and `drawing`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.report.report import report
    from flexigpt.report.stack import plan_picture
else:
    lazy_door(__name__)
