"""What gradients may not contain: directions found from contrastive pairs, removed before the optimizer's step or from it.

    gradients = pair_gradients(model, parameters, pairs)             # {name: (P, numel)}: D of each pair
    basis = extract(gradients, origin=origin_of(model, parameters, pairs))
    stats, removed = project_(parameters, basis, "one_sided")        # on .grad: after backward, before clipping
    moved = projected_step(optimizer, parameters, basis)             # steps, and says where the parameters really went

The sign, once. A pair has one prompt, a completion that hacks and one that does not, and D = grad NLL(hack) - grad NLL(clean),
NLL the mean over a completion's tokens. A GRPO group of these two at advantages +1 and -1 has the loss
-(1/2) [mean w(hack) - mean w(clean)], w the ratio, whose gradient at w = 1 is D / 2. An optimizer steps along -g, and -D makes
the hack likelier. So with axes V oriented as D, c = V g: c > 0 descends toward the hack.

Any named parameter will do: a delta on singular values and the B of a LoRA whose A is frozen go through the same lines. The
method: https://github.com/wassname/evil_MoE. Its authors' basis is stale within ten steps: compare with `random_basis`.
"""
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from checkpoints import atomic_write
from data import right_pad
from losses import token_logprobs
from model import Decoder
from svd import tensor_hash

MODES = ("none", "one_sided", "no_gate", "reverse")
WHOLE = ("pcgrad", "agem", "complement")  # what projection is compared with: of the whole gradient, whatever the axes

# -------------------------------------------------------------------------------------------------- pairs -> gradients


def contrast(model: Decoder, prompt: list[int], hack: list[int], clean: list[int], temperature: float = 1.0) -> Tensor:
    """NLL(hack) - NLL(clean) given the prompt, each the mean over its own tokens, in nats; a differentiable scalar."""
    ids, mask = (t.to(model.device) for t in right_pad([[*prompt, *hack], [*prompt, *clean]], 0))
    valid = mask[:, len(prompt) :]
    hidden = model.hidden(ids[:, :-1])[:, len(prompt) - 1 :][valid]  # the state at t - 1 scores token t
    logprobs = token_logprobs(hidden, model.head_weight, ids[:, len(prompt) :][valid], temperature)
    return logprobs[len(hack) :].mean() - logprobs[: len(hack)].mean()


def pair_gradients(model: Decoder, parameters: dict[str, nn.Parameter], pairs, temperature: float = 1.0) -> dict[str, Tensor]:
    """D = grad NLL(hack) - grad NLL(clean) of each pair, flat, by parameter name: {name: (P, numel)}. `.grad` is not touched.

    pairs: (prompt_ids, hack_ids, clean_ids) each, lists of ints. Raises ValueError for no pair, an empty prompt or completion,
    two equal completions, and a parameter that no gradient reaches.
    """
    if not pairs:
        raise ValueError("no contrastive pair: a basis needs some")
    for i, (prompt, hack, clean) in enumerate(pairs):
        if not len(prompt) or not len(hack) or not len(clean):
            raise ValueError(f"pair {i}: prompt and completions must have tokens, not {len(prompt)}, {len(hack)}, {len(clean)}")
        if list(hack) == list(clean):
            raise ValueError(f"pair {i}: its two completions are the same tokens, so they contrast nothing")
    rows = {name: [] for name in parameters}
    for pair in pairs:
        loss = contrast(model, *pair, temperature)
        grads = [None] * len(parameters)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads):
            if grad is None:
                raise ValueError(f"no gradient reaches {name}: its branch is off (scale 0), or its gate is closed")
            rows[name].append(grad.reshape(-1))
    return {name: torch.stack(grads) for name, grads in rows.items()}


def shuffled_labels(gradients: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A placebo: hack and clean swapped in pairs chosen by coin (the same pairs for every parameter).

    A swap turns the sign of D, which leaves the span of the axes as it was and turns only their orientation: no placebo for
    no_gate, which takes no notice of that.
    """
    pairs = len(next(iter(gradients.values())))
    signs = torch.randint(0, 2, (pairs, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return {name: D * signs.to(D) for name, D in gradients.items()}


# -------------------------------------------------------------------------------------------------------------- bases


def origin_of(model: Decoder, parameters: dict[str, nn.Parameter], pairs) -> dict[str, str]:
    """Hashes of what a basis is made from: pairs, weights (the frozen base), adapter (its spec, the parameters' names and shapes,
    tensors that it drew and keeps frozen), values (of the parameters; they change with every step)."""
    adapter = model.adapter
    own = {id(p) for group in (*adapter.groups.values(), adapter.constants) for p in group.values()}
    base = [p for p in (adapter.frozen or model).parameters() if id(p) not in own]
    described = f"{adapter.spec} {[(name, tuple(p.shape)) for name, p in parameters.items()]}"
    return {
        "pairs": text_hash(json.dumps([[list(map(int, ids)) for ids in pair] for pair in pairs])),
        "weights": tensor_hash(*base),
        "adapter": text_hash(described + tensor_hash(*adapter.constants.values())),
        "values": tensor_hash(*parameters.values()),
    }


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Basis:
    """Oriented orthonormal axes (k, numel) and their singular values (k,) by parameter name; k may differ, none is empty."""

    rows: dict[str, Tensor]
    singular: dict[str, Tensor]
    origin: dict[str, str] = field(default_factory=dict)  # see origin_of
    held_out: list[dict[str, float]] = field(default_factory=list)  # `alignment` of D for each pair that was left out

    def save(self, path: str | Path) -> None:
        parts = {"rows": self.rows, "singular": self.singular}
        tensors = {f"{kind}/{name}": t.contiguous().cpu() for kind, group in parts.items() for name, t in group.items()}
        metadata = {"origin": json.dumps(self.origin), "held_out": json.dumps(self.held_out)}
        atomic_write(path, save(tensors, metadata=metadata))

    @staticmethod
    def load(path: str | Path, expected: dict[str, str], device="cpu") -> "Basis":
        """Reads a basis. Raises ValueError where its origin is not the `expected` one, naming what differs: pass origin_of(...),
        or the entries of it that matter."""
        parts = {"rows": {}, "singular": {}}
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                for key in file.keys():
                    kind, _, name = key.partition("/")
                    parts[kind][name] = file.get_tensor(key).clone()  # aligned, as what was saved: see load_checkpoint
            origin, held_out = json.loads(metadata["origin"]), json.loads(metadata["held_out"])
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"cannot read basis {path}: {error}") from error
        for what, value in expected.items():
            if origin.get(what) != value:
                raise ValueError(f"basis {path} was made from other {what} than these: extract it again")
        return Basis(**parts, origin=origin, held_out=held_out)


def oriented_axes(D: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors (k, n) and singular values (k,) of D (P, n), k = min(keep, rank of D).

    An axis points to where most pairs project positively; where as many project negatively, to the mean projection's side.
    """
    exact = D.double()
    _, singular, V = torch.linalg.svd(exact, full_matrices=False)
    k = min(keep, int((singular > 1e-6 * singular[0]).sum()))
    singular, V = singular[:k], V[:k]
    projections = exact @ V.t()  # (P, k)
    majority = projections.sign().sum(0)
    lean = torch.where(majority == 0, projections.mean(0), majority)
    V = (V * torch.where(lean < 0, -1.0, 1.0)[:, None]).to(D.dtype)
    return V.contiguous(), singular.to(D.dtype)  # as a file gives it back: products round by the layout


def extract(
    gradients: dict[str, Tensor], keep: int = 12, use: int = 5, tau: float = 0.25, held_out: int = 2,
    origin: dict[str, str] | None = None,
) -> Basis:  # fmt: skip
    """A basis from the pairs' gradients {name: (P, n)}, of which the last `held_out` pairs only test it.

    Of each parameter `keep` axes. Their singular values, pooled over all parameters, have a quantile `tau`: axes below it are
    noise wherever they stand, so that no parameter's best axis is safe for being its own best. Of the rest the first `use`;
    parameters without any left are not in the basis. Raises ValueError for too few pairs, and where nothing is left.
    """
    if not 1 <= use <= keep or not 0 <= tau < 1 or held_out < 0:
        raise ValueError(f"1 <= use <= keep, 0 <= tau < 1 and held_out >= 0 must hold: {use}, {keep}, {tau}, {held_out}")
    pairs = len(next(iter(gradients.values())))
    if pairs - held_out < 1:
        raise ValueError(f"{pairs} pairs with {held_out} held out leave none to extract from")
    axes = {name: oriented_axes(D[: pairs - held_out], keep) for name, D in gradients.items()}
    pooled = torch.cat([singular for _, singular in axes.values()])
    if not len(pooled):
        raise ValueError("every pair's gradient is zero: there is no direction to extract")
    floor = pooled.quantile(tau)
    basis = Basis({}, {}, dict(origin or {}))
    for name, (V, singular) in axes.items():
        if bool((loud := singular >= floor).any()):
            basis.rows[name], basis.singular[name] = V[loud][:use], singular[loud][:use]
    basis.held_out = [alignment({name: gradients[name][i] for name in basis.rows}, basis) for i in range(pairs - held_out, pairs)]
    return basis


def random_basis(like: Basis, seed: int) -> Basis:
    """A placebo: random orthonormal axes, as many for each parameter as `like` has; an axis depends on seed, name and place
    alone, so that one made afresh is the same."""
    rows = {}
    for name, V in like.rows.items():
        generator = torch.Generator().manual_seed(int(text_hash(f"{seed} {name}")[:15], 16))
        Q, R = torch.linalg.qr(torch.randn(V.shape, generator=generator, dtype=torch.float64).t())
        rows[name] = (Q * R.diagonal().sign()).t().to(V).contiguous()
    return Basis(rows, dict(like.singular), like.origin | {"pairs": f"random, seed {seed}"})


def overlap(new: Basis, old: Basis) -> float:
    """Mean |<v_new, v_old>| over the axes, in their order, of parameters that both bases have; 0 where there is none."""
    both = [(new.rows[name], old.rows[name]) for name in new.rows if name in old.rows]
    products = [(a[: len(b)] * b[: len(a)]).sum(1).abs() for a, b in both]
    return torch.cat(products).mean().item() if products else 0.0


# --------------------------------------------------------------------------------------------------------- projecting


def gradients_in(tensors: dict[str, Tensor], basis: Basis) -> dict[str, Tensor]:
    """The gradients that the basis has axes for: `.grad` of a parameter (None is left out), any other tensor itself."""
    found = {}
    for name, V in basis.rows.items():
        if name not in tensors:
            raise ValueError(f"the basis has axes for {name}, which is not among the parameters: it is of another adapter")
        gradient = tensors[name].grad if isinstance(tensors[name], nn.Parameter) else tensors[name]
        if gradient is not None and gradient.numel() != V.shape[1]:
            raise ValueError(f"the axes of {name} have {V.shape[1]} numbers, its gradient {gradient.numel()}")
        if gradient is not None:
            found[name] = gradient
    return found


@torch.no_grad()
def alignment(tensors: dict[str, Tensor], basis: Basis) -> dict[str, float]:
    """Where gradients point, over parameters with a gradient other than 0; c = V g (k,) for each.

    signed: mean cosine with the sum of the axes, sum(c) / (sqrt(k) |g|); can be negative. cin: mean of |relu(c)| / |g|, never
    negative, see `null_cin`. cin_energy: sqrt(sum |relu(c)|^2 / sum |g|^2). fired: share with any c > 0; 1 - 2^-k by chance.
    """
    return figures(gradients_in(tensors, basis), basis)


def figures(gradients: dict[str, Tensor], basis: Basis) -> dict[str, float]:
    table = []
    for name, gradient in gradients.items():
        flat = gradient.reshape(-1)
        c, norm = basis.rows[name].to(flat) @ flat, flat.norm()
        positive = c.clamp(min=0).norm()
        table.append(torch.stack([c.sum() / len(c) ** 0.5, positive, norm, (c > 0).any().to(norm)]))
    rows = [row for row in torch.stack(table).tolist() if row[2] > 0] if table else []  # one transfer from the device
    count, energy = max(1, len(rows)), sum(norm**2 for _, _, norm, _ in rows)
    return {
        "signed": sum(signed / norm for signed, _, norm, _ in rows) / count,
        "cin": sum(positive / norm for _, positive, norm, _ in rows) / count,
        "cin_energy": math.sqrt(sum(positive**2 for _, positive, _, _ in rows) / energy) if rows else 0.0,
        "fired": sum(fired for *_, fired in rows) / count,
    }


def component(c: Tensor, mode: str) -> Tensor:
    """The part of the coordinates c (k,) that a mode subtracts."""
    if mode == "no_gate":
        return c
    return c.clamp(min=0) * {"one_sided": 1.0, "reverse": 2.0}[mode]


@torch.no_grad()
def project_(
    tensors: dict[str, Tensor], basis: Basis, mode: str = "one_sided", overshoot: float = 1.0, rescale: bool = False
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """g <- g - overshoot * V^T component(c) in place, for the gradients `gradients_in` finds; c = V g.

    one_sided subtracts relu(c), the descent toward the hack; no_gate c, both ways; reverse 2 relu(c), which turns that descent
    round; none only measures. `rescale` gives all of them together the norm they had before.
    Returns `alignment` before, its entries after as signed_out, cout and cout_energy, and what was removed, by name.
    """
    if mode not in MODES:
        raise ValueError(f"unknown projection {mode!r}; known: {', '.join(MODES)}")
    gradients = gradients_in(tensors, basis)
    stats, removed = figures(gradients, basis), {}
    size = total_norm(gradients)
    for name, gradient in gradients.items() if mode != "none" else ():
        V = basis.rows[name].to(gradient)
        removed[name] = (overshoot * component(V @ gradient.reshape(-1), mode) @ V).view(gradient.shape)
        gradient.sub_(removed[name])
    left = total_norm(gradients)
    if rescale and left > 1e-6 * size:  # less than that is rounding
        for gradient in gradients.values():
            gradient.mul_(size / left)
    return stats | figures_after(gradients, basis), removed


def figures_after(gradients: dict[str, Tensor], basis: Basis) -> dict[str, float]:
    """`figures` by the names they have once a mode has been applied."""
    found = figures(gradients, basis)
    return {"signed_out": found["signed"], "cout": found["cin"], "cout_energy": found["cin_energy"]}


def total_norm(gradients: dict[str, Tensor]) -> float:
    return torch.stack([g.norm() for g in gradients.values()]).norm().item() if gradients else 0.0


def projected_step(optimizer, parameters: dict[str, nn.Parameter], basis: Basis, mode: str = "none", overshoot: float = 1.0):
    """optimizer.step(), of whose movement `mode` removes what `project_` would of a gradient; returns its statistics.

    The movement is taken as descent, before - after, so that the signs are a gradient's. Moments and a rate per coordinate turn
    a projected gradient's step back toward what was removed from it: with `none` the figures say how far.
    """
    gradients_in(parameters, basis)  # the names and sizes fit, before anything moves
    before = {name: parameters[name].detach().clone() for name in basis.rows}
    optimizer.step()
    stats, removed = project_({name: old - parameters[name].detach() for name, old in before.items()}, basis, mode, overshoot)
    for name, part in removed.items():
        parameters[name].data.add_(part)
    return stats


def route_removed_(removed: dict[str, Tensor], parameters: dict[str, nn.Parameter], source: str, target: str) -> None:
    """Route instead of erase: the gradients of branch `target` become what was removed from those of `source`, None elsewhere.

    parameters: those of `target` by name. The two must share their basis, as the branches of a delta or of a frozen A do.
    Raises ValueError where `target` has no such parameter, or one of another shape.
    """
    moved = {name.replace(f".{source}.", f".{target}."): part for name, part in removed.items()}
    for name, part in moved.items():
        if name not in parameters or parameters[name].shape != part.shape:
            raise ValueError(f"nothing of shape {tuple(part.shape)} is called {name}: {target} can't learn what {source} may not")
    for name, p in parameters.items():
        p.grad = moved.get(name)


def null_cin(axes: int, numbers: int) -> float:
    """E |relu(V g)| / |g| of a random direction g in `numbers` dimensions and any `axes` orthonormal axes.

    j of the k coordinates are positive with probability C(k, j) / 2^k; the norm of j coordinates of a random unit vector has
    the mean G((j+1)/2) G(n/2) / (G(j/2) G((n+1)/2)), its square being Beta(j/2, (n-j)/2).
    """
    half = math.lgamma(numbers / 2) - math.lgamma((numbers + 1) / 2)
    terms = (math.comb(axes, j) * math.exp(math.lgamma((j + 1) / 2) - math.lgamma(j / 2) + half) for j in range(1, axes + 1))
    return sum(terms) / 2**axes


def null_of(basis: Basis) -> float:
    """What `alignment`'s cin would be by chance."""
    return sum(null_cin(*V.shape) for V in basis.rows.values()) / len(basis.rows)


# ---------------------------------------------------------------------------------- what projection is compared with


def flatten(tensors: list[Tensor]) -> Tensor:
    """Gradients (or any tensors) as one vector (n,)."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten_(vector: Tensor, tensors: list[Tensor]) -> None:
    """The inverse of `flatten`, in place."""
    for t, part in zip(tensors, vector.split([t.numel() for t in tensors])):
        t.copy_(part.view(t.shape))


def without_conflict(gradient: Tensor, other: Tensor) -> Tensor:
    """g - (g.h / |h|^2) h where g.h < 0, else g; all (n,)."""
    dot = gradient @ other
    return gradient - dot / (other @ other) * other if dot < 0 else gradient


def pcgrad(gradients: Tensor, generator: torch.Generator) -> Tensor:
    """(T, n) gradients of T losses -> (n,): each freed from its conflicts with the others as they were, in random order, and
    summed. Yu et al. 2020, https://arxiv.org/abs/2001.06782, algorithm 1."""
    total = torch.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        for j in torch.randperm(len(gradients), generator=generator).tolist():
            if j != i:
                gradient = without_conflict(gradient, gradients[j])
        total = total + gradient
    return total


def agem(gradient: Tensor, memory: Tensor) -> Tensor:
    """(n,): the gradient freed from its conflict with the mean gradient of what must not get worse.

    Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420, eq. 11.
    """
    return without_conflict(gradient, memory)


def span(directions: Tensor) -> Tensor:
    """Orthonormal rows (r, n) with the span of directions (k, n), which need be neither orthogonal nor independent."""
    _, singular, V = torch.linalg.svd(directions.double(), full_matrices=False)
    return V[singular > 1e-6 * singular[0]].to(directions.dtype).contiguous()


def orthogonal_complement(gradient: Tensor, rows: Tensor) -> Tensor:
    """(n,): the gradient without its part in the span of orthonormal rows (r, n)."""
    return gradient - rows.t() @ (rows @ gradient)


def whole_directions(gradients: dict[str, Tensor], mode: str) -> Tensor:
    """What `project_whole_` needs of the pairs' gradients D {name: (P, n)}, over all parameters at once (N numbers).

    pcgrad, agem: h = -mean D (1, N), the gradient of the loss NLL(clean) - NLL(hack), which must not get worse.
    complement: `span` of D (r, N).
    """
    D = torch.cat(list(gradients.values()), dim=1)
    return span(D) if mode == "complement" else -D.mean(0, keepdim=True)


@torch.no_grad()
def project_whole_(parameters: dict[str, nn.Parameter], basis: Basis, directions: Tensor, mode: str) -> dict[str, float]:
    """The gradients of all parameters as one vector g, changed in place by a mode of WHOLE; statistics as `project_` gives them.

    agem frees g from its conflict with h; pcgrad adds h to that, freed from its conflict with g; complement takes g out of the
    span. Parameters without a gradient (none of a branch has one, or all have) stay without.
    """
    stats = figures(gradients_in(parameters, basis), basis)
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    if grads:
        g = flatten(grads)
        directions = directions.to(g)
        if mode == "complement":
            g = orthogonal_complement(g, directions)
        elif mode == "agem":
            g = agem(g, directions[0])
        else:  # two gradients can be taken in one order only, so the generator decides nothing
            g = pcgrad(torch.stack([g, directions[0]]), torch.Generator())
        unflatten_(g, grads)
    return stats | figures_after(gradients_in(parameters, basis), basis)
