"""Branches: named, scaled, trainable additions to a frozen decoder.

    spec = preset("r8", dual=True)                    # two low-rank branches per linear layer, good and bad
    attach(model, spec, seed=0)                       # base frozen; fresh branches leave the output bitwise unchanged
    with scaled(model, good=1, bad=0): ...            # scales come back afterwards, whatever happens

A branch is a low-rank pair (`LoRALinear`: one branch, `DualLoRALinear`: good and bad), a delta on the singular values of a
weight (`DeltaSLinear`), a gated MLP beside a layer's MLP, or a residual bundle behind a layer (bundles.py). All share one
mechanism: `model.adapter` holds each branch's scale and its `Gate`, by name.

gates.py has the products; adapter_files.py saves, loads, exports to PEFT and merges.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Dual branches: Cloud et al. 2024, https://arxiv.org/abs/2410.04332.
"""
import copy
import math
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from bundles import BUNDLE_PRESETS, BundledLayer
from gates import AddBranches, AddDeltas, Gate, GatedLinear, GatedScale
from model import Decoder, projections
from svd import singular_vectors

# --------------------------------------------------------------------------------------------------------- branches


@dataclass(frozen=True)
class Branch:
    """One branch of an adapter: `rank` is LoRA's r, a delta's number of singular directions (at most), the units of a gated
    MLP, or a bundle's share of the model's width. The first two's outputs are scaled by alpha / rank."""

    name: str
    rank: float
    alpha: float


FULL_RANK = 2**31  # of a delta: every singular direction, min(in, out) of each layer
LOW_RANK = ("lora", "lora_b")
LINEAR_KINDS = (*LOW_RANK, "delta_s")
KINDS = (*LINEAR_KINDS, "mlp", "bundles", "full")


@dataclass(frozen=True)
class AdapterSpec:
    """What is attached where. kind: lora, lora_b (A frozen, only B trains), delta_s (on singular values), mlp, bundles, or
    full (no branch: every weight trains)."""

    kind: str
    branches: tuple[Branch, ...] = ()
    targets: tuple[str, ...] = ()  # names of linear layers; empty: all of the family
    stride: int = 1  # every how-manieth layer is adapted
    dropout: float = 0.0  # share of a low-rank branch's inputs that is dropped in training: see `dropping`

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown adapter kind {self.kind!r}; known: {', '.join(KINDS)}")
        names = [b.name for b in self.branches]
        if len(set(names)) < len(names):
            raise ValueError(f"branch names must differ, not {', '.join(names)}")
        if any(b.rank < 0 for b in self.branches) or (self.kind != "full" and not any(b.rank for b in self.branches)):
            raise ValueError(f"a {self.kind} adapter needs at least one branch of rank above 0, none below: {self.branches}")
        if self.kind == "bundles" and any(b.rank > 1 for b in self.branches):
            raise ValueError(f"a bundle's rank is a share of the model's width, at most 1: {self.branches}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1 (every layer), not {self.stride}")
        if self.targets and self.kind not in LINEAR_KINDS:
            raise ValueError(f"targets choose linear layers; a {self.kind} adapter takes none: {self.targets}")
        if not 0 <= self.dropout < 1 or (self.dropout and self.kind not in LOW_RANK):
            raise ValueError(f"dropout is a share, below 1, of a low-rank branch's inputs, not {self.dropout} of {self.kind}")


@dataclass
class Adapter:
    """The state that all branches of a model share: scales and gates by branch name."""

    spec: AdapterSpec
    scales: dict[str, float] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    frozen: Decoder | None = None  # full fine-tuning alone: a copy of the model as it was
    groups: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)  # trainable parameters by branch and name
    constants: dict[str, nn.Parameter] = field(default_factory=dict)  # frozen tensors that were drawn: the A of lora_b
    dropping: bool = False  # whether passes that record gradients drop inputs

    @property
    def names(self) -> list[str]:
        return [branch.name for branch in self.spec.branches]


class LowRank(nn.Module):
    """B A. A (r, in) ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming with a = sqrt 5), B (out, r) = 0: exactly one side starts at zero.
    Always fp32. An A that is given is frozen."""

    def __init__(self, branch: Branch, inputs: int, outputs: int, generator, device, A: torch.Tensor | None = None):
        super().__init__()
        trains, bound = A is None, 1 / math.sqrt(inputs)
        A = torch.empty(branch.rank, inputs).uniform_(-bound, bound, generator=generator) if trains else A
        self.A = nn.Parameter(A.to(device), requires_grad=trains)
        self.B = nn.Parameter(torch.zeros(outputs, branch.rank, device=device))


class LoRALinear(nn.Module):
    """A frozen linear layer with low-rank branches."""

    def __init__(self, base: nn.Linear, adapter: Adapter, generator):
        super().__init__()
        self.base, self.adapter = base, adapter
        branches = [b for b in adapter.spec.branches if b.rank]
        self.factor = {b.name: b.alpha / b.rank for b in branches}
        self.parts = nn.ModuleDict(self.fresh(branches, generator))

    def fresh(self, branches: list[Branch], generator) -> dict[str, nn.Module]:
        (outputs, inputs), device = self.base.weight.shape, self.base.weight.device
        if self.adapter.spec.kind == "lora":
            return {b.name: LowRank(b, inputs, outputs, generator, device) for b in branches}
        most = max(b.rank for b in branches)
        if most > inputs:
            raise ValueError(f"rank {most} of a frozen A exceeds a layer's {inputs} inputs: orthonormal rows are at most so many")
        A = nn.init.orthogonal_(torch.empty(most, inputs), generator=generator)  # one basis, as the branches of a delta have
        return {b.name: LowRank(b, inputs, outputs, None, device, A[: b.rank].clone()) for b in branches}

    def active(self) -> list[tuple[str, nn.Module, float]]:
        """(name, branch, scale) of the branches that are on."""
        pairs = ((name, branch, self.adapter.scales[name] * self.factor[name]) for name, branch in self.parts.items())
        return [item for item in pairs if item[2] != 0]

    def forward(self, x):
        active = self.active()
        if not active:
            return self.base(x)
        if self.adapter.dropping and torch.is_grad_enabled():
            return self.dropped(x, active)
        pairs = [p for _, branch, _ in active for p in (branch.A, branch.B)]
        gates = [self.adapter.gates[name] for name, _, _ in active]
        return AddBranches.apply(x, self.base.weight, self.base.bias, [s for *_, s in active], gates, *pairs)

    def dropped(self, x, active):
        """W x + b + sum_k s_k B_k A_k z, z what F.dropout leaves of x: 0 at the rate p, else x / (1 - p), in fp32. All branches
        read one z, so that good and bad are together the one LoRA of the summed rank, as without dropout."""
        z, y = F.dropout(x.to(active[0][1].A.dtype), self.adapter.spec.dropout), self.base(x)
        for name, branch, scale in active:
            gate = self.adapter.gates[name]
            y = y + scale * GatedLinear.apply(GatedLinear.apply(z, branch.A, gate), branch.B, gate)
        return y.to(x.dtype)

    def pair(self, branch: str) -> tuple[torch.Tensor, torch.Tensor]:
        """One branch as A (r, in), B (out, r), without its scale and alpha / rank."""
        return self.parts[branch].A, self.parts[branch].B

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The branches that are on as one pair A (R, in), B (out, R), scales in B; R is 0 where all are off."""
        outputs, inputs = self.base.weight.shape
        device = self.base.weight.device
        A = [branch.A for _, branch, _ in self.active()]
        B = [branch.B * scale for _, branch, scale in self.active()]
        return (
            torch.cat(A) if A else torch.zeros(0, inputs, device=device),
            torch.cat(B, dim=1) if B else torch.zeros(outputs, 0, device=device),
        )


class DualLoRALinear(LoRALinear):
    """LoRALinear with the two branches of gradient routing, `good` (retain) and `bad` (forget)."""

    def __init__(self, base: nn.Linear, adapter: Adapter, generator):
        if adapter.names != ["good", "bad"]:
            raise ValueError(f"DualLoRALinear has the branches good and bad, not {adapter.names}")
        super().__init__(base, adapter, generator)


class Delta(nn.Module):
    """A number for each of the first `rank` singular directions, in fp32; all 0."""

    def __init__(self, rank: int, device):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(rank, device=device))


class DeltaSLinear(LoRALinear):
    """A frozen linear layer W = U S V with branches U (delta * V x): a LoRA whose B is U diag(delta) and whose A is V.

    U (out, R) and V (R, in) hold the singular vectors of the largest R singular values, shared by all branches (svd.py).
    """

    def fresh(self, branches: list[Branch], generator) -> dict[str, nn.Module]:
        U, V = singular_vectors(self.base.weight, max(b.rank for b in branches))
        self.register_buffer("U", U, persistent=False)
        self.register_buffer("V", V, persistent=False)
        return {b.name: Delta(min(b.rank, len(V)), V.device) for b in branches}

    def forward(self, x):
        active = self.active()
        if not active:
            return self.base(x)
        (outputs, inputs), rows = self.base.weight.shape, x.numel() // x.shape[-1]
        if x.dtype != self.V.dtype or rows * (outputs + inputs) < outputs * inputs:
            return self.beside(x)  # for so few rows a merged weight costs more, and each call keeps its own for its backward pass
        gates = [self.adapter.gates[name] for name, _, _ in active]
        deltas = [branch.delta for _, branch, _ in active]
        return AddDeltas.apply(x, self.base.weight, self.base.bias, self.U, self.V, [s for *_, s in active], gates, *deltas)

    def beside(self, x):
        """Unmerged: for few rows, and in fp32 beside a base in bfloat16, which would round small branches away. A slow twin."""
        inner = F.linear(x.to(self.V.dtype), self.V)  # (..., R)
        mixed = torch.zeros_like(inner)
        for name, branch, scale in self.active():
            part = GatedScale.apply(inner[..., : len(branch.delta)], branch.delta, self.adapter.gates[name])
            mixed = mixed + scale * F.pad(part, (0, inner.shape[-1] - len(branch.delta)))
        return (self.base(x) + F.linear(mixed, self.U)).to(x.dtype)

    def pair(self, branch: str) -> tuple[torch.Tensor, torch.Tensor]:
        delta = self.parts[branch].delta
        return self.V[: len(delta)], self.U[:, : len(delta)] * delta

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        active, total = self.active(), self.U.new_zeros(len(self.V))
        for _, branch, scale in active:
            total[: len(branch.delta)] += scale * branch.delta
        return (self.V, self.U * total) if active else (self.V[:0], self.U[:, :0])

    def fingerprint(self) -> torch.Tensor:
        """(R,): what each pair u v^T makes of two fixed random vectors. The sign that a decomposition gives to a pair of singular
        vectors is arbitrary, and does not matter to it; other directions do."""
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(n, generator=generator).to(self.U) for n in (len(self.U), self.V.shape[1]))
        return (left @ self.U) * (self.V @ right)


class GatedUnits(nn.Module):
    """down(SiLU(gate x) * up x) in fp32; gate and up as kaiming-uniform, down = 0."""

    def __init__(self, branch: Branch, width: int, generator, device):
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.gate = nn.Parameter(torch.empty(branch.rank, width).uniform_(-bound, bound, generator=generator).to(device))
        self.up = nn.Parameter(torch.empty(branch.rank, width).uniform_(-bound, bound, generator=generator).to(device))
        self.down = nn.Parameter(torch.zeros(width, branch.rank, device=device))


class BranchedMLP(nn.Module):
    """A frozen MLP with gated MLP branches beside it."""

    def __init__(self, base: nn.Module, width: int, adapter: Adapter, generator):
        super().__init__()
        self.base, self.adapter = base, adapter
        device = next(base.parameters()).device
        self.parts = nn.ModuleDict({b.name: GatedUnits(b, width, generator, device) for b in adapter.spec.branches if b.rank})

    def branches(self, x):
        """The sum of the branches that are on, in x's dtype; x (B, T, C)."""
        y = torch.zeros((), device=x.device)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))  # never below fp32; a model in fp64 stays there
        for name, unit in self.parts.items():
            if (scale := self.adapter.scales[name]) == 0:
                continue
            gate = self.adapter.gates[name]
            inner = F.silu(GatedLinear.apply(exact, unit.gate, gate)) * GatedLinear.apply(exact, unit.up, gate)
            y = y + scale * GatedLinear.apply(inner, unit.down, gate)
        return y.to(x.dtype)

    def forward(self, x):
        return self.base(x) + self.branches(x)


# ---------------------------------------------------------------------------------------------- attaching, scaling

PRESETS = (
    "r1 ... r32 (rank), r1h (every second layer), r32f4 (good 32, bad 4), r32o (A orthonormal and frozen), ds or ds32 (singular "
    "values: all or the top 32), m16 or m16f4 (gated MLP units), bundles, bundles_rl2 or one_bundle (residual bundles), full"
)


def preset(name: str, dual: bool) -> AdapterSpec:
    """An adapter by the name that `--lora_config` takes: PRESETS above. alpha is each branch's own rank.

    Without `dual` there is one branch, of the summed rank: the control of equal capacity. Where the branches share a frozen
    basis (r32o, ds) the sum would be another basis, so there it is the good branch alone. Raises ValueError for others.
    """
    if name == "full":
        if dual:
            raise ValueError("full fine-tuning has no branches to route to; use a LoRA or MLP preset with --routing dual")
        return AdapterSpec("full")
    if name in BUNDLE_PRESETS:
        if dual:
            raise ValueError(f"{name} has no good and bad branch; use a LoRA or MLP preset with --routing dual")
        return AdapterSpec("bundles", tuple(Branch(bundle, share, 1.0) for bundle, share in BUNDLE_PRESETS[name].items()))
    match = re.fullmatch(r"(r|m|ds)(\d*)(h?)(o?)(?:f(\d+))?", name)
    letters, digits, half, frozen, smaller = match.groups() if match else ("", "", "", "", None)
    kind = {"r": "lora", "ro": "lora_b", "m": "mlp", "ds": "delta_s"}.get(letters + frozen)
    good = FULL_RANK if kind == "delta_s" and not digits else int(digits or 0)
    if not kind or not good:
        raise ValueError(f"unknown --lora_config {name!r}; known: {PRESETS}")
    bad = good if smaller is None else int(smaller)
    single = good if kind in ("lora_b", "delta_s") else good + bad
    ranks = {"good": good, "bad": bad} if dual else {"adapter": single}
    branches = tuple(Branch(n, r, float(r)) for n, r in ranks.items())
    return AdapterSpec(kind, branches, stride=2 if half else 1)


@dataclass
class AdapterFlags:
    """What train scripts say of a LoRA beside its ranks, which --lora_config gives."""

    lora_alpha: float = 0.0
    """a LoRA's output is scaled by alpha / rank, the rank that it has without routing (r8: 16), and so is each branch; 0: by 1"""
    lora_dropout: float = 0.0
    """share of a LoRA's inputs dropped in the passes that make gradients, in no other; masks depend on the micro-batches"""
    lora_targets: str = ""
    """linear layers to adapt, by name, parted by commas: c_attn,c_proj (gpt2), query_key_value (pythia); empty: all there are"""


def spec_of(flags: dict, dual: bool) -> AdapterSpec:
    """The adapter that a run's flags ask for: lora_config, and those of AdapterFlags, which older runs lack.

    Two branches have the alpha / rank of the one without `dual`: r8 with alpha 32 is rank 16, or twice 8, scaled by 2. Raises
    ValueError for what a --lora_config of that kind does not take.
    """
    name, values = flags["lora_config"], asdict(AdapterFlags()) | {k: v for k, v in flags.items() if hasattr(AdapterFlags, k)}
    spec, alpha, dropout = preset(name, dual), values["lora_alpha"], values["lora_dropout"]
    for flag, kinds in (("lora_alpha", LOW_RANK), ("lora_dropout", LOW_RANK), ("lora_targets", LINEAR_KINDS)):
        if values[flag] and spec.kind not in kinds:
            raise ValueError(f"--{flag} is of adapters {', '.join(kinds)}, and --lora_config {name} is {spec.kind}: leave it out")
    if not alpha >= 0 or not 0 <= dropout < 1:
        raise ValueError(f"--lora_alpha must be at least 0 and --lora_dropout in 0..1, below 1, not {alpha} and {dropout}")
    branches = spec.branches
    if alpha:
        rank = preset(name, dual=False).branches[0].rank
        branches = tuple(replace(b, alpha=alpha * b.rank / rank) for b in branches)
    targets = tuple(target.strip() for target in values["lora_targets"].split(",") if target.strip())
    return replace(spec, branches=branches, targets=targets, dropout=dropout)


def attach(model: Decoder, spec: AdapterSpec, seed: int = 0) -> Decoder:
    """Freezes the model and attaches branches in place. `seed` draws their initial values. Returns the model.

    Raises ValueError for a target that the model does not have, or a model that has an adapter already.
    """
    if hasattr(model, "adapter"):
        raise ValueError("the model has an adapter already: load it afresh")
    adapter = Adapter(spec, {b.name: 1.0 for b in spec.branches}, {b.name: Gate() for b in spec.branches})
    if spec.kind == "full":
        adapter.frozen = copy.deepcopy(model).requires_grad_(False)
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    names = projections(model.config)
    known = tuple(dict.fromkeys((*names["qkv"], names["out"], *names["up"], names["down"])))
    if unknown := [t for t in spec.targets if t not in known]:
        raise ValueError(f"unknown adapter target {unknown[0]!r}; a {model.config.family} has {', '.join(known)}")
    kind = DeltaSLinear if spec.kind == "delta_s" else DualLoRALinear if adapter.names == ["good", "bad"] else LoRALinear
    for i in range(0, len(model.layers), spec.stride):
        layer = model.layers[i]
        if spec.kind == "bundles":
            model.layers[i] = BundledLayer(layer, model.config.width, adapter, generator)
        elif spec.kind == "mlp":
            layer.mlp = BranchedMLP(layer.mlp, model.config.width, adapter, generator)
        elif spec.kind in LINEAR_KINDS:
            for part in (layer.self_attn, layer.mlp):
                for name in spec.targets or known:
                    if isinstance(getattr(part, name, None), nn.Linear):
                        setattr(part, name, kind(getattr(part, name), adapter, generator))
    if spec.kind == "full":
        adapter.groups = {"full": dict(model.named_parameters())}
    else:
        adapter.groups = {name: {} for name in adapter.names}
        for path, module in model.named_modules():
            if isinstance(module, (LoRALinear, BranchedMLP, BundledLayer)):
                for branch, part in module.parts.items():
                    for name, p in part.named_parameters():
                        kept = adapter.groups[branch] if p.requires_grad else adapter.constants
                        kept[f"{path}.{branch}.{name}"] = p
    model.adapter = adapter
    return model


def set_scales(model: Decoder, good_scale: float | None = None, bad_scale: float | None = None, **scales: float) -> None:
    """Sets how much each branch counts: set_scales(model, 1, 0), or by name: set_scales(model, adapter=.5)."""
    scales |= {name: value for name, value in (("good", good_scale), ("bad", bad_scale)) if value is not None}
    if unknown := sorted(set(scales) - set(model.adapter.scales)):
        raise ValueError(f"no branch {unknown[0]!r} to scale; this adapter has {', '.join(model.adapter.names) or 'none'}")
    model.adapter.scales.update(scales)


@contextmanager
def scaled(model: Decoder, **scales: float):
    """Scales for the length of a `with` block, e.g. scaled(model, good=1, bad=0)."""
    before = dict(model.adapter.scales)
    try:
        set_scales(model, **scales)
        yield model
    finally:
        model.adapter.scales.update(before)


@contextmanager
def dropping(model: Decoder, seed: int):
    """Inside the block, forward passes that record gradients drop inputs of low-rank branches at the spec's rate; those of the
    sampler, the reference and evaluations, which record none, never do. At rate 0 it does nothing at all.

    Masks are a function of `seed` (a step's, so that there is nothing to save) and of what passes there are. They come from the
    global generator, which activation checkpointing replays, and which is given back as it was.
    """
    if not model.adapter.spec.dropout:
        yield
        return
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed ^ 0x5DEECE66D)  # another stream than the one that the step's tokens are drawn from
        model.adapter.dropping = True
        try:
            yield
        finally:
            model.adapter.dropping = False


@contextmanager
def reference(model: Decoder):
    """The untrained policy: this model with every branch off; where there is a frozen copy (full fine-tuning, or after
    `freeze_reference`) that copy."""
    if model.adapter.frozen is not None:
        yield model.adapter.frozen
    else:
        with scaled(model, **{name: 0.0 for name in model.adapter.names}):
            yield model


def freeze_reference(model: Decoder) -> None:
    """From here on the reference policy is the model as it is now: a copy of what is trained, on the same frozen weights."""
    model.adapter.frozen = None
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad}
    model.adapter.frozen = copy.deepcopy(model, shared).requires_grad_(False)


def branch_parameters(model: Decoder) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by branch and name; under full fine-tuning all are the branch `full`."""
    return model.adapter.groups


def parameters_of(model: Decoder, branch: str) -> list[nn.Parameter]:
    """The trainable parameters of one branch."""
    groups = branch_parameters(model)
    if branch not in groups:
        raise ValueError(f"no branch {branch!r}; this adapter has {', '.join(groups)}")
    return list(groups[branch].values())


def adapter_tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """All tensors that are trained or were drawn, by name; a fresh adapter of the same spec takes them back through
    `set_adapter_tensors`."""
    groups = (*branch_parameters(model).values(), model.adapter.constants)
    return {name: p.detach() for group in groups for name, p in group.items()}


def set_adapter_tensors(model: Decoder, tensors: dict[str, torch.Tensor], source: str) -> None:
    mine = adapter_tensors(model)
    if wrong := sorted(set(mine) ^ set(tensors)):
        raise ValueError(f"{source} does not fit this adapter: {wrong[0]} is in one of them only ({len(wrong)} such)")
    for name, tensor in tensors.items():
        if tensor.shape != mine[name].shape:
            raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, the adapter {tuple(mine[name].shape)}")
        mine[name].copy_(tensor)
