"""Records -> figures and one HTML page that needs nothing else.

Read `report`, `page`, then `figures`, `result_figures` and `drawing`.
"""

from typing import TYPE_CHECKING

from flexigpt.runtime.doors import lazy_door

if TYPE_CHECKING:
    from flexigpt.report.drawing import plan_picture
    from flexigpt.report.report import card_pictures, report
else:
    lazy_door(__name__)
