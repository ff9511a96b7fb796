"""Data-dependent initialisation of a fusion: what each layer reads becomes centred, of unit spread.

Text states and step summaries are mostly one constant vector (on phantoms the summaries' mean is ten times as long as
what tells them apart), which a LayerNorm leaves as it is, and each linear layer shrinks what the image says by about
half. Without this, 600 updates at 1e-3 leave the image part near nothing; with it the step AUROC rises within 50.

Legend: T tags, D text width, N image tokens, W image width, F fusion width, I and O a layer's inputs and outputs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from medmm_ray.reward_model import Fusion

FLOOR = 0.01  # of the mean spread: an input that hardly changes is not blown up


def initialize_fusion(
    fusion: "Fusion", states_TD: "torch.Tensor", summaries_TD: "torch.Tensor", tokens_NW: "torch.Tensor"
) -> None:
    """Rescale the untrained linear layers of `fusion`, in place, by what goes in and comes out of them on this data.

    The output projection stays zero: the image part still changes nothing until it is trained. Raises ValueError for
    data that is not finite.
    """
    import torch

    for name, rows in (("states", states_TD), ("summaries", summaries_TD), ("image tokens", tokens_NW)):
        num_broken = int((~rows.isfinite().all(dim=-1)).sum())
        if num_broken:
            raise ValueError(
                f"{num_broken} of {len(rows)} {name} hold NaN or infinity; a fusion cannot be fitted to them"
            )
    with torch.no_grad():
        _initialize_query(fusion, states_TD, summaries_TD)
        _initialize_projector(fusion, tokens_NW)


def _initialize_query(fusion: "Fusion", states_TD: "torch.Tensor", summaries_TD: "torch.Tensor") -> None:
    """Fit the layer that makes attention queries of the text's states."""
    import torch

    inputs_TI = fusion.state_norm(states_TD)
    if fusion.summary_norm is not None:
        inputs_TI = torch.cat([inputs_TI, fusion.summary_norm(summaries_TD)], dim=-1)
    standardize_inputs(fusion.query, inputs_TI)
    standardize_outputs(fusion.query, inputs_TI)


def _initialize_projector(fusion: "Fusion", tokens_NW: "torch.Tensor") -> None:
    """Fit the image's path in its order: each layer is fitted to what those before it give."""
    layers: list[Any] = list(fusion.projector)
    norm, first, activation, second = layers
    inputs_NW = norm(tokens_NW)
    standardize_inputs(first, inputs_NW)
    standardize_outputs(first, inputs_NW)
    inner_NF = activation(first(inputs_NW))
    standardize_outputs(second, inner_NF)
    projected_NF = second(inner_NF)
    standardize_outputs(fusion.attend_value, projected_NF)
    standardize_outputs(fusion.attend_out, fusion.attend_value(projected_NF))


def standardize_inputs(layer: "torch.nn.Linear", inputs_NI: "torch.Tensor") -> None:
    """Fold the standardisation of its inputs into a layer."""
    layer.weight.div_(spread(inputs_NI))
    layer.bias.sub_(layer.weight @ inputs_NI.mean(dim=0))


def standardize_outputs(layer: "torch.nn.Linear", inputs_NI: "torch.Tensor") -> None:
    """Give a layer's outputs unit spread and, where it has a bias, mean 0."""
    outputs_NO = layer(inputs_NI)
    spread_O = spread(outputs_NO)
    layer.weight.div_(spread_O[:, None])
    if layer.bias is not None:
        layer.bias.sub_(outputs_NO.mean(dim=0)).div_(spread_O)


def spread(values_NI: "torch.Tensor") -> "torch.Tensor":
    """The standard deviation [I] of each column, none below `FLOOR` of their mean; 1 where none varies (one row)."""
    import torch

    if len(values_NI) < 2 or bool((values_NI == values_NI[0]).all()):
        return torch.ones_like(values_NI[0])
    spread_I = values_NI.std(dim=0)
    return spread_I.clamp(min=FLOOR * float(spread_I.mean()))
