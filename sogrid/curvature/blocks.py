r"""The layer blocks of a dense curvature matrix, their inverse, and the thesis's order of parameters.

A block holds the parameters one module owns itself: for an ``nn.Linear``, weight and bias together;
for a normalisation, its own. Blocks partition θ, so nothing is left out.

Inside a linear layer torch orders [W.reshape(−1); b] (rows of W one after the other) and the thesis
[vec(W); b] (columns). Kronecker formulas, A ⊗ B with A on the input side, hold in the thesis's order.

Thesis §3.1.5, §3.2.4, §6.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "block_diagonal",
    "block_inverse",
    "condition_number",
    "layer_blocks",
    "layer_indices",
    "to_thesis_order",
]


def layer_indices(model: nn.Module) -> dict[str, Tensor]:
    """Positions in θ of the parameters of each module that owns some, by module name.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> {name: where.tolist() for name, where in layer_indices(model).items()}
        {'0': [0, 1, 2, 3], '2': [4, 5, 6]}
    """
    parts: dict[str, list[Tensor]] = {}
    start = 0
    for name, p in model.named_parameters():
        stop = start + p.numel()
        parts.setdefault(name.rpartition(".")[0], []).append(torch.arange(start, stop, device=p.device))
        start = stop
    return {name: torch.cat(where) for name, where in parts.items()}


def layer_blocks(model: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
    """The diagonal block of each layer (F_l in Thesis §3.2.4), in torch's order, by module name.

    Args:
        model: The module whose parameters index ``matrix``.
        matrix: ``[P, P]``.

    Returns:
        For an ``nn.Linear``, ``[n_out·n_in + n_out, n_out·n_in + n_out]``.

    Raises:
        ValueError: If the matrix does not have one row and column per parameter.
    """
    size = sum(p.numel() for p in model.parameters())
    if matrix.shape != (size, size):
        raise ValueError(f"matrix must be [{size}, {size}] for this model, got {list(matrix.shape)}")
    return {name: matrix[where[:, None], where] for name, where in layer_indices(model).items()}


def block_diagonal(model: nn.Module, matrix: Tensor) -> Tensor:
    """``matrix: [P, P]`` with everything outside the layer blocks set to zero (Thesis §3.1.5).

    Raises:
        ValueError: If the matrix does not have one row and column per parameter.
    """
    return _assemble(model, matrix, layer_blocks(model, matrix))


def block_inverse(model: nn.Module, matrix: Tensor, damping: float = 0.0) -> Tensor:
    """blockdiag((M_l + εI)⁻¹): the inverse of the damped block diagonal, block by block (§3.1.5).

    Args:
        model: The module whose parameters index ``matrix``.
        matrix: ``[P, P]``.
        damping: ε, added to the diagonal of every block (Thesis §3.1.3).

    Returns:
        ``[P, P]``, zero outside the layer blocks.

    Raises:
        ValueError: If the matrix does not have one row and column per parameter.
        torch.linalg.LinAlgError: If a damped block is exactly singular.
    """
    inverses = {}
    for name, block in layer_blocks(model, matrix).items():
        identity = torch.eye(len(block), dtype=block.dtype, device=block.device)
        inverses[name] = torch.linalg.inv(block + damping * identity)
    return _assemble(model, matrix, inverses)


def _assemble(model: nn.Module, like: Tensor, blocks: dict[str, Tensor]) -> Tensor:
    """Put blocks by name back at their places in a zero matrix."""
    out = torch.zeros_like(like)
    for name, where in layer_indices(model).items():
        out[where[:, None], where] = blocks[name]
    return out


def condition_number(matrix: Tensor) -> Tensor:
    """Largest over smallest eigenvalue of a symmetric matrix, in magnitude; infinite if it is singular.

    Singular means up to rounding: the ratio exceeds 1 / (P · machine epsilon), torch's rank criterion.

    Args:
        matrix: ``[P, P]``, symmetric.

    Example:
        >>> condition_number(torch.diag(torch.tensor([4.0, 2.0]))).item()
        2.0
    """
    size = torch.linalg.eigvalsh(matrix).abs()
    low, high = size.min(), size.max()
    singular = low <= len(matrix) * torch.finfo(matrix.dtype).eps * high
    return torch.where(singular, torch.full_like(high, torch.inf), high / low)


def to_thesis_order(layer: nn.Linear, block: Tensor) -> Tensor:
    """Reorder a layer's vector or square block from [W.reshape(−1); b] to [vec(W); b] (Thesis §6.2).

    Args:
        layer: The ``nn.Linear``; without a bias there is no b.
        block: ``[m]`` or ``[m, m]`` in torch's order, m the layer's number of parameters.

    Returns:
        The same entries, columns of W stacked.

    Raises:
        ValueError: If the sides are not m.

    Example:
        >>> layer = nn.Linear(3, 2)  # torch: w11 w12 w13 w21 w22 w23 b1 b2
        >>> to_thesis_order(layer, torch.arange(8)).tolist()
        [0, 3, 1, 4, 2, 5, 6, 7]
    """
    device = layer.weight.device
    order = torch.arange(layer.weight.numel(), device=device).view_as(layer.weight).mT.reshape(-1)
    if layer.bias is not None:
        order = torch.cat([order, len(order) + torch.arange(layer.out_features, device=device)])
    if block.ndim not in (1, 2) or set(block.shape) != {len(order)}:
        raise ValueError(f"a layer's vector or block must have side {len(order)}, got {list(block.shape)}")
    for dim in range(block.ndim):
        block = block.index_select(dim, order)
    return block
