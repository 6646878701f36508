"""Branches: named, scaled, trainable additions to a frozen decoder.

    spec = preset("r8", dual=True)                    # two low-rank branches per linear layer, good and bad
    attach(model, spec, seed=0)                       # base frozen; fresh branches leave the output bitwise unchanged
    with scaled(model, good=1, bad=0): ...            # scales come back afterwards, whatever happens

A branch is a low-rank pair (`LoRALinear`: one branch, `DualLoRALinear`: good and bad) or a gated MLP beside a layer's
MLP. All share one mechanism: `model.adapter` holds each branch's scale and its `Gate`, by name.
 gates.py has the products; adapter_files.py saves, loads, exports to PEFT and merges.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Dual branches: Cloud et al. 2024, https://arxiv.org/abs/2410.04332.
"""
import copy
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from gates import AddBranches, Gate, GatedLinear
from model import Decoder, projections

# --------------------------------------------------------------------------------------------------------- branches


@dataclass(frozen=True)
class Branch:
    """One branch of an adapter: `rank` is LoRA's r, or the units of a gated MLP. Low-rank outputs are scaled by alpha / rank."""

    name: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class AdapterSpec:
    """What is attached where. kind: lora, mlp, or full (no branch: every weight trains)."""

    kind: str
    branches: tuple[Branch, ...] = ()
    targets: tuple[str, ...] = ()  # names of linear layers; empty: all of the family
    stride: int = 1  # every how-manieth layer is adapted

    def __post_init__(self):
        if self.kind not in ("lora", "mlp", "full"):
            raise ValueError(f"unknown adapter kind {self.kind!r}; known: lora, mlp, full")
        names = [b.name for b in self.branches]
        if len(set(names)) < len(names):
            raise ValueError(f"branch names must differ, not {', '.join(names)}")
        if any(b.rank < 0 for b in self.branches) or (self.kind != "full" and not any(b.rank for b in self.branches)):
            raise ValueError(f"a {self.kind} adapter needs at least one branch of rank above 0, none below: {self.branches}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1 (every layer), not {self.stride}")
        if self.targets and self.kind != "lora":
            raise ValueError(f"targets choose linear layers for a lora adapter; a {self.kind} adapter takes none: {self.targets}")


@dataclass
class Adapter:
    """The state that all branches of a model share: scales and gates by branch name."""

    spec: AdapterSpec
    scales: dict[str, float] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    frozen: Decoder | None = None  # full fine-tuning alone: a copy of the model as it was
    groups: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)  # trainable parameters by branch and name

    @property
    def names(self) -> list[str]:
        return [branch.name for branch in self.spec.branches]


class LowRank(nn.Module):
    """A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming with a = sqrt 5), B = 0: exactly one side starts at zero. Always fp32."""

    def __init__(self, branch: Branch, inputs: int, outputs: int, generator, device):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        A = torch.empty(branch.rank, inputs).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(outputs, branch.rank, device=device))


class LoRALinear(nn.Module):
    """A frozen linear layer with low-rank branches."""

    def __init__(self, base: nn.Linear, adapter: Adapter, generator):
        super().__init__()
        self.base, self.adapter = base, adapter
        outputs, inputs = base.weight.shape
        self.factor = {b.name: b.alpha / b.rank for b in adapter.spec.branches if b.rank}
        self.parts = nn.ModuleDict(
            {b.name: LowRank(b, inputs, outputs, generator, base.weight.device) for b in adapter.spec.branches if b.rank}
        )

    def active(self) -> list[tuple[str, LowRank, float]]:
        """(name, branch, scale) of the branches that are on."""
        pairs = ((name, branch, self.adapter.scales[name] * self.factor[name]) for name, branch in self.parts.items())
        return [item for item in pairs if item[2] != 0]

    def forward(self, x):
        active = self.active()
        if not active:
            return self.base(x)
        pairs = [p for _, branch, _ in active for p in (branch.A, branch.B)]
        gates = [self.adapter.gates[name] for name, _, _ in active]
        return AddBranches.apply(x, self.base.weight, self.base.bias, [s for *_, s in active], gates, *pairs)

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

PRESETS = "r1 ... r32 (rank), r1h (every second layer), r32f4 (good 32, bad 4), m16 or m16f4 (gated MLP units), full"


def preset(name: str, dual: bool) -> AdapterSpec:
    """An adapter by the name that `--lora_config` takes: PRESETS above. alpha is each branch's own rank.

    Without `dual` there is one branch, of the summed rank: the control of equal capacity. Raises ValueError for others.
    """
    if name == "full":
        if dual:
            raise ValueError("full fine-tuning has no branches to route to; use a LoRA or MLP preset with --routing dual")
        return AdapterSpec("full")
    match = re.fullmatch(r"([rm])(\d+)(h?)(?:f(\d+))?", name)
    if not match or int(match[2]) == 0:
        raise ValueError(f"unknown --lora_config {name!r}; known: {PRESETS}")
    good, bad = int(match[2]), int(match[4] if match[4] is not None else match[2])
    ranks = {"good": good, "bad": bad} if dual else {"adapter": good + bad}
    branches = tuple(Branch(n, r, float(r)) for n, r in ranks.items())
    return AdapterSpec("lora" if match[1] == "r" else "mlp", branches, stride=2 if match[3] else 1)


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
    kind = DualLoRALinear if adapter.names == ["good", "bad"] else LoRALinear
    for layer in model.layers[:: spec.stride]:
        if spec.kind == "mlp":
            layer.mlp = BranchedMLP(layer.mlp, model.config.width, adapter, generator)
        elif spec.kind == "lora":
            for part in (layer.self_attn, layer.mlp):
                for name in spec.targets or known:
                    if isinstance(getattr(part, name, None), nn.Linear):
                        setattr(part, name, kind(getattr(part, name), adapter, generator))
    if spec.kind == "full":
        adapter.groups = {"full": dict(model.named_parameters())}
    else:
        adapter.groups = {name: {} for name in adapter.names}
        for path, module in model.named_modules():
            if isinstance(module, (LoRALinear, BranchedMLP)):
                for branch, part in module.parts.items():
                    adapter.groups[branch] |= {f"{path}.{branch}.{name}": p for name, p in part.named_parameters()}
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
def reference(model: Decoder):
    """The untrained policy: this model with every branch off; under full fine-tuning the frozen copy."""
    if model.adapter.frozen is not None:
        yield model.adapter.frozen
    else:
        with scaled(model, **{name: 0.0 for name in model.adapter.names}):
            yield model


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
    """All trainable tensors by name; a fresh adapter of the same spec takes them back through `set_adapter_tensors`."""
    return {name: p.detach() for group in branch_parameters(model).values() for name, p in group.items()}


def set_adapter_tensors(model: Decoder, tensors: dict[str, torch.Tensor], source: str) -> None:
    mine = adapter_tensors(model)
    if wrong := sorted(set(mine) ^ set(tensors)):
        raise ValueError(f"{source} does not fit this adapter: {wrong[0]} is in one of them only ({len(wrong)} such)")
    for name, tensor in tensors.items():
        if tensor.shape != mine[name].shape:
            raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, the adapter {tuple(mine[name].shape)}")
        mine[name].copy_(tensor)
