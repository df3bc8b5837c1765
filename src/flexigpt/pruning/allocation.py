"""Where bytes are spent: how many of its own units each MLP keeps, and which sublayers go."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from flexigpt.calibration import Sensitivity, SourceStates, overflow, sensitivities
from flexigpt.model import Plan, SublayerReplica, find_architecture, model_shape, sublayer_paths
from flexigpt.pruning.options import PruneOptions
from flexigpt.pruning.source import CheckedSource, Workspace
from flexigpt.record import Record
from flexigpt.replicas import Elimination, eliminate
from flexigpt.runtime import CachedStage, InputError, digest, parse_size
from flexigpt.text import shown_texts


class OutOfReach(InputError):
    """So small a model cannot be made."""


class Form(NamedTuple):
    """One of the forms that a sublayer can have.

    Attributes:
        parameters: that it stores.
        cost: of the loss, by the second-order estimate.
        row: of the plan; None: the sublayer is kept.
    """

    parameters: int
    cost: float
    row: SublayerReplica | None


class Measured(NamedTuple):
    """What is known of a source's sublayers.

    Attributes:
        mlps: by block, in which order units go and what that costs.
        attentions: by block, what it costs to leave the attention out.
    """

    mlps: Sequence[Elimination]
    attentions: Sequence[float]

    def record(self, workspace: Workspace[PruneOptions]) -> Record:
        """What the record says of it: the text, what it costs to leave out each whole sublayer, and an MLP's units."""
        options = workspace.options
        costs = {"attention": list(self.attentions), "mlp": [mlp.costs[-1].item() for mlp in self.mlps]}
        text = {
            "text": shown_texts(options.calibration),
            "windows": list(workspace.windows.shape),
            "asked": options.windows,
        }
        return {"calibration": text, "sublayer_costs": costs, "mlp_units": len(self.mlps[0].order)}


def measure_sublayers(workspace: Workspace[PruneOptions], refits: bool = False) -> Measured:
    """Measures all sublayers on the calibration windows, or finds what was measured; a killed run goes on.

    Args:
        workspace: what the flow works on.
        refits: whether a refit to the same text follows, for which the workspace then keeps the source's states. On a
            GPU it does not: memory is scarcer there than time.
    """
    with workspace.cache.stage("sublayers", windows=digest(workspace.windows)) as stage:
        if stage.result is None:
            stage.finish(_measure(workspace, stage, refits and workspace.source.device.type == "cpu"))
        found = stage.result
    mlps = [
        Elimination(
            torch.tensor(row["order"]), torch.tensor(row["left"]), torch.tensor(row["costs"], dtype=torch.float64)
        )
        for row in found["mlps"]
    ]
    return Measured(mlps, found["attentions"])


def _measure(workspace: Workspace[PruneOptions], stage: CachedStage, keeps: bool) -> dict[str, list[Any]]:
    source, windows = workspace.source, workspace.windows
    roles = find_architecture(source.model.config).roles
    copies = SourceStates.copies(len(source)) if keeps else len(source)
    spill = workspace.hidden_in(copies + 1)
    states = workspace.states if keeps else None
    if states is not None:
        states.folder = spill
    given = (source, windows, (roles.output, roles.down))
    walk = sensitivities(*given, spill=spill, states=states, stage=stage, track=workspace.track)
    for block, of_linears in walk:

        def make(block: int = block, of_linears: Mapping[str, Sensitivity] = of_linears) -> dict[str, torch.Tensor]:
            written, errors = of_linears[roles.output]
            weight = source.weight_matrix(block, roles.output).to(errors.dtype)
            attention = ((errors @ weight) * (weight @ written)).sum().view(1)
            down = source.weight_matrix(block, roles.down)
            return {"attention": attention, **eliminate(down, *of_linears[roles.down])._asdict()}

        stage.tensors(f"block-{block}", make)
        of_linears.clear()  # they would be there until the next block's are
    found: dict[str, list[Any]] = {"mlps": [], "attentions": []}
    for block in range(len(source)):
        kept = stage.tensors(f"block-{block}", partial(_missing, stage))
        if not all(values.isfinite().all() for values in kept.values()):
            raise overflow(f"the sensitivities of block {block}")
        found["attentions"].append(kept.pop("attention").item())
        found["mlps"].append({name: values.tolist() for name, values in kept.items()})
    return found


def _missing(stage: CachedStage) -> dict[str, torch.Tensor]:
    """What the walk left out as done was damaged since."""
    stage.discard()
    raise InputError("what an earlier run left in the cache is damaged: start again")


def stored_for(checked: CheckedSource[PruneOptions]) -> int:
    """How many parameters the compact model may store.

    Raises:
        InputError: a ratio or a size that the source rules out.
    """
    options, shape = checked.options, checked.shape
    if options.ratio is not None:
        return shape.parameters_at(options.ratio, checked.depth)
    assert options.target_size is not None
    target = parse_size(options.target_size, checked.itemsize)
    shape.check_target(target)
    return target


def check_sublayers(checked: CheckedSource[PruneOptions], plan: Plan) -> None:
    """Raises InputError for a plan whose sublayers the source cannot have, or that needs text where none is read."""
    units, needed = sublayer_paths(checked.empty)["mlp"]["units"], anchors(checked.empty.config)
    if plan.sublayers and not checked.options.by_units:
        raise InputError("the plan prunes units, which takes calibration text to choose: leave out --preset paper")
    for one in plan.sublayers:
        if one.units is not None and one.units >= units:
            raise InputError(
                f"the plan keeps {one.units} units of the MLP of block {one.block}, which has {units}: name fewer, or "
                "leave the row out"
            )
        if one.sublayer == "attention" and one.block in needed:
            raise InputError(
                f"the plan leaves out the attention of block {one.block}, by which transformers tells how long the "
                "key/value cache is: keep it"
            )


def units_of(workspace: Workspace[PruneOptions], plan: Plan) -> dict[int, torch.Tensor]:
    """By block, which hidden units its MLP keeps, where not all."""
    asked = {one.block: one.units for one in plan.sublayers if one.units is not None}
    measured = measure_sublayers(workspace) if asked else None
    return {} if measured is None else {block: measured.mlps[block].kept(units) for block, units in asked.items()}


def forms_of(workspace: Workspace[PruneOptions], measured: Measured) -> list[list[Form]]:
    """The forms of each sublayer, attention and MLP of the first block first."""
    source = workspace.source.model
    sizes, roles = model_shape(source).linears, find_architecture(source.config).roles
    parameters = {path: outputs * inputs for path, (outputs, inputs) in sizes.items()}
    of_mlp = {path for path in (roles.gate, roles.up, roles.down) if path is not None}
    mlp = sum(parameters[path] for path in of_mlp)
    attention = sum(parameters.values()) - mlp
    units = sizes[roles.down][1]
    needed = anchors(source.config)
    forms: list[list[Form]] = []
    for block in range(workspace.depth):
        gone = SublayerReplica(block=block, sublayer="attention", form="none")
        removed = [] if block in needed else [Form(0, measured.attentions[block], gone)]
        forms.append([Form(attention, 0.0, None), *removed])
        elimination = measured.mlps[block]
        points = zip(elimination.left.tolist(), elimination.costs.tolist(), strict=True)
        forms.append([Form(mlp // units * left, cost, _mlp_with(block, left, units)) for left, cost in points])
    return forms


def _mlp_with(block: int, left: int, units: int) -> SublayerReplica | None:
    if left == units:
        return None
    if left == 0:
        return SublayerReplica(block=block, sublayer="mlp", form="none")
    return SublayerReplica(block=block, sublayer="mlp", form="units", units=left)


def anchors(config: PreTrainedConfig) -> set[int]:
    """Blocks whose attention stays: transformers reads the length of its key/value cache off the first of each kind."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return {kinds.index(kind) for kind in kinds}


def allocate(forms: Sequence[Sequence[Form]], budget: int) -> list[SublayerReplica]:
    """The forms of least total cost within a budget of parameters, by Lagrange multipliers (Everett, 1963).

    Of each sublayer the forms on the lower convex hull of cost by parameters count; the budget goes where it mends most
    for each parameter, until nothing more fits.

    Args:
        forms: of each sublayer.
        budget: parameters of all sublayers together.

    Returns:
        The rows of those that are not kept.

    Raises:
        InputError: a budget below what the smallest forms store.
    """
    chosen = []
    steps: list[tuple[float, int, Form, int]] = []
    for index, of_one in enumerate(forms):
        hull = _hull(of_one)
        chosen.append(hull[0])
        for before, after in itertools.pairwise(hull):
            more = after.parameters - before.parameters
            steps.append(((before.cost - after.cost) / more, index, after, more))
    left = budget - sum(form.parameters for form in chosen)
    if left < 0:
        raise OutOfReach(
            f"so small a model is out of reach: the sublayers that have to stay store {budget - left:,} parameters, "
            f"where {max(budget, 0):,} are left for them; give a --target-size that is {-left:,} larger, or a smaller "
            "--ratio"
        )
    full: set[int] = set()
    for _, index, form, more in sorted(steps, key=lambda step: (-step[0], step[1], step[2].parameters)):
        if more > left:
            full.add(index)  # a hull is climbed without gaps
        if index not in full:
            chosen[index], left = form, left - more
    return [form.row for form in chosen if form.row is not None]


def _hull(forms: Sequence[Form]) -> list[Form]:
    """Those on the lower convex hull, fewest parameters first."""
    hull: list[Form] = []
    for form in sorted(forms, key=lambda form: (form.parameters, form.cost)):
        if hull and form.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], form):
            hull.pop()
        hull.append(form)
    return hull


def _slope(before: Form, after: Form) -> float:
    return (after.cost - before.cost) / (after.parameters - before.parameters)


def allocated(workspace: Workspace[PruneOptions], measured: Measured, stored: int) -> Plan:
    """The plan of least cost whose model stores so many parameters, or a few less."""
    shape = workspace.shape
    budget = stored - shape.parameters + workspace.depth * shape.linear_parameters
    rows = allocate(forms_of(workspace, measured), budget)
    return Plan(num_blocks=workspace.depth, sublayers=tuple(rows))
