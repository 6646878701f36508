"""The gate, which weights the gradient of a branch's parameters, and the products that obey it.

    gate = Gate(); gate.set(torch.tensor([1.0, 0.0]))     # sample 0 trains the branch, sample 1 does not
    y = AddBranches.apply(x, weight, bias, [scale], [gate], A, B)      # W x + b + scale B A x
    y = AddDeltas.apply(x, weight, bias, U, V, [scale], [gate], delta) # W x + b + scale U (delta * V x)

A gate weights the gradient of parameters only, by a number or per sample or per token: forward values and the gradient that
flows to lower layers are as without it. It is read when backward runs, so one forward pass can serve several differently
routed losses. routing.py decides the weights.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import product


class Gate:
    """The weight of a branch's parameter gradients: None (1), a number, or a tensor per sample (B,) or per token (B, T).

    A number is what the whole call is worth: 0 leaves `.grad` untouched, None stays None, so that no momentum or decay
    can move the branch.
    """

    def __init__(self):
        self.weight: None | float | torch.Tensor = None

    def set(self, weight):
        """Sets the weight; a tensor that is all 0 becomes the number 0, all 1 becomes None."""
        if isinstance(weight, torch.Tensor) and weight.dim() == 0:
            weight = weight.item()
        if isinstance(weight, torch.Tensor):
            if not weight.any():
                weight = 0.0
            elif bool((weight == 1).all()):
                weight = None
        self.weight = weight

    @property
    def closed(self) -> bool:
        return not isinstance(self.weight, torch.Tensor) and self.weight == 0

    def rows(self, shape: torch.Size, like: torch.Tensor) -> None | float | torch.Tensor:
        """The weight as a column for activations of shape (B, T, ...) flattened to (B * T, 1), of device and dtype `like`."""
        if not isinstance(self.weight, torch.Tensor):
            return self.weight
        weight = self.weight.to(like)
        if weight.shape[0] != shape[0] or (weight.dim() == 2 and weight.shape[1] != shape[1]):
            raise ValueError(f"gate weights {tuple(weight.shape)} do not fit a batch of shape {tuple(shape)}")
        weight = weight[:, None] if weight.dim() == 1 else weight
        return weight.expand(shape[0], shape[1]).reshape(-1, 1)


class GatedLinear(torch.autograd.Function):
    """x W^T, the gradient of W weighted by a gate. The primitive, and the slow twin of `AddBranches`."""

    @staticmethod
    def forward(ctx, x, weight, gate: Gate):
        ctx.save_for_backward(x, weight)
        ctx.gate = gate
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight
        if ctx.gate.closed or not ctx.needs_input_grad[1]:
            return grad_x, None, None
        rows = ctx.gate.rows(x.shape, grad)
        grad = grad.reshape(-1, grad.shape[-1])
        return grad_x, (grad if rows is None else grad * rows).t() @ x.reshape(-1, x.shape[-1]), None


class AddBranches(torch.autograd.Function):
    """W x + b + sum_k s_k B_k A_k x for a frozen W, all branches in one pair of products.

    x (..., in); A_k (r_k, in) and B_k (out, r_k) in fp32, follow in *pairs as A_1, B_1, A_2, B_2, ... In bfloat16 the base
    product and the activations are bfloat16, the branches are computed and summed in fp32.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scales: list[float], gates: list[Gate], *pairs):
        if weight.requires_grad:
            raise RuntimeError("a base weight under branches must be frozen: its gradient is not computed here")
        ranks = [a.shape[0] for a in pairs[0::2]]
        flat = x.reshape(-1, x.shape[-1])
        scale = None
        if any(s != 1 for s in scales):
            scale = torch.cat([pairs[0].new_full((r,), float(s)) for r, s in zip(ranks, scales)])
        A, B = AddBranches.stacked(pairs, scale)
        inner = product(flat.to(A.dtype), A)  # (N, R)
        y = product(flat, weight, bias)
        y += product(inner, B)
        ctx.save_for_backward(flat, inner, weight, *pairs)  # not A and B, which are larger than a single token's activations
        ctx.shape, ctx.ranks, ctx.scale, ctx.gates = x.shape, ranks, scale, gates
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def stacked(pairs, scale):
        """A (R, in) and, scaled, B (out, R) of all branches."""
        A, B = torch.cat(pairs[0::2]), torch.cat(pairs[1::2], dim=1)
        return A, B if scale is None else B * scale

    @staticmethod
    @once_differentiable  # A, B and inner count as constants: a second derivative would silently be wrong
    def backward(ctx, grad):
        x, inner, weight, *pairs = ctx.saved_tensors
        A, B = AddBranches.stacked(pairs, ctx.scale)
        grad = grad.reshape(-1, grad.shape[-1])
        exact = grad.to(B.dtype)
        grad_inner = product(exact, B.t())  # (N, R)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.t())
            grad_x += product(grad_inner, A.t())
            grad_x = grad_x.view(ctx.shape)
        if all(gate.closed for gate in ctx.gates):
            return grad_x, None, None, None, None, *[None] * (2 * len(ctx.ranks))
        rows = [gate.rows(ctx.shape, inner) for gate in ctx.gates]
        if any(r is not None for r in rows):  # weight the R inner columns, which is cheap, instead of in and out
            columns = [
                r.expand(-1, n) if isinstance(r, torch.Tensor) else inner.new_full((1, n), 1.0 if r is None else float(r))
                for r, n in zip(rows, ctx.ranks)
            ]
            weights = torch.cat([c.expand(len(x), -1) for c in columns], dim=1)
            inner, grad_inner = inner * weights, grad_inner * weights
        grad_A = product(grad_inner.t(), x.to(A.dtype).t()) if any(ctx.needs_input_grad[5::2]) else torch.zeros_like(A)  # (R, in)
        grad_B = product(inner.t(), exact.t()).t()  # (out, R)
        if ctx.scale is not None:
            grad_B = grad_B * ctx.scale
        grads = []
        for gate, a, b in zip(ctx.gates, grad_A.split(ctx.ranks), grad_B.split(ctx.ranks, dim=1)):
            grads += [None, None] if gate.closed else [a, b]
        return grad_x, None, None, None, None, *grads


class GatedScale(torch.autograd.Function):
    """x * delta, the gradient of delta (r,) weighted by a gate; x (B, T, r). The slow twin of `AddDeltas`."""

    @staticmethod
    def forward(ctx, x, delta, gate: Gate):
        ctx.save_for_backward(x, delta)
        ctx.gate = gate
        return x * delta

    @staticmethod
    def backward(ctx, grad):
        x, delta = ctx.saved_tensors
        if ctx.gate.closed or not ctx.needs_input_grad[1]:
            return grad * delta, None, None
        rows = ctx.gate.rows(x.shape, grad)
        terms = (grad * x).reshape(-1, len(delta))
        return grad * delta, (terms if rows is None else terms * rows).sum(0), None


class AddDeltas(torch.autograd.Function):
    """(W + U diag(sum_k s_k delta_k) V) x + b for frozen W, U and V, merged into one weight for this call.

    x (..., in), W (out, in), U (out, R), V (R, in), all of one dtype; delta_k (r_k,) with r_k at most R acts on the first r_k
    directions. The gradient of delta_k is s_k diag(U^T (rows_k * dL/dy)^T x V^T), rows_k the weights of its gate.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, U, V, scales: list[float], gates: list[Gate], *deltas):
        if weight.requires_grad:
            raise RuntimeError("a base weight under branches must be frozen: its gradient is not computed here")
        total = U.new_zeros(U.shape[1])
        for scale, delta in zip(scales, deltas):
            total[: len(delta)] += scale * delta
        merged = weight + product(U * total, V.t())  # (out, in)
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, merged, U, V)
        ctx.shape, ctx.ranks, ctx.scales, ctx.gates = x.shape, [len(delta) for delta in deltas], scales, gates
        return product(flat, merged, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # merged is saved as a constant: a second derivative would silently be wrong
    def backward(ctx, grad):
        x, merged, U, V = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = product(grad, merged.t()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        distinct, grads = {}, []  # gates that weight alike share their product
        for gate in ctx.gates:
            if not gate.closed:
                rows = gate.rows(ctx.shape, grad)
                distinct[id(gate.weight) if isinstance(rows, torch.Tensor) else None] = rows
        columns = [rows if isinstance(rows, torch.Tensor) else None for rows in distinct.values()]
        diagonals = dict(zip(distinct, weighted_diagonals(grad, x, U, V, columns)))
        for gate, scale, rank in zip(ctx.gates, ctx.scales, ctx.ranks):
            if gate.closed:
                grads.append(None)
            elif isinstance(gate.weight, torch.Tensor):
                grads.append(scale * diagonals[id(gate.weight)][:rank])
            else:
                grads.append(scale * (1.0 if gate.weight is None else gate.weight) * diagonals[None][:rank])
        return grad_x, *[None] * 6, *grads


def weighted_diagonals(grad, x, U, V, columns: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """diag(U^T (column * grad)^T x V^T) (R,) for each column of weights (N, 1); None weights all rows by 1.

    grad (N, out), x (N, in), U (out, R), V (R, in). Through the weight's gradient (out, in) or through the R directions of each
    row, whichever takes fewer multiplications: the first for many rows and all directions, the second for few directions.
    """
    (n, outputs), (R, inputs) = grad.shape, V.shape
    if n * R * (outputs + inputs) < len(columns) * (n + R) * outputs * inputs:
        terms = product(grad, U.t()) * product(x, V)  # (N, R)
        return [terms.sum(0) if column is None else terms.t().mv(column.squeeze(1)) for column in columns]
    weight_grads = [product((grad if column is None else grad * column).t(), x.t()) for column in columns]  # (out, in)
    return [(product(U.t(), G.t()) * V).sum(1) for G in weight_grads]
