"""Branches: named, scaled, trainable additions to a frozen decoder.

    spec = preset("r8", dual=True)                    # two low-rank branches per linear layer, good and bad
    attach(model, spec, seed=0)                       # base frozen; fresh branches leave the output bitwise unchanged
    with scaled(model, good=1, bad=0): ...            # scales come back afterwards, whatever happens
    save_adapter(model, "adapter.safetensors"); export_peft(model, "good", "peft_good"); merged = merge(model)

A branch is a low-rank pair (`LoRALinear`: one branch, `DualLoRALinear`: good and bad) or a gated MLP beside a layer's
MLP. All share one mechanism: `model.adapter` holds each branch's scale and its `Gate`, by name.

The gate is the primitive that routing.py drives. It weights the gradient of a branch's *parameters*, by a number or per
sample or per token, and leaves forward values and the gradient that flows to lower layers alone. A gate is read when
backward runs, so one forward pass can serve several differently routed losses. It stands here, beside the forward pass
it is part of; routing.py decides its weights.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. Dual branches: Cloud et al. 2024, https://arxiv.org/abs/2410.04332.
"""
import copy
import json
import math
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.autograd.function import once_differentiable

from model import Decoder, hf_name, product, projections

# ------------------------------------------------------------------------------------------------------------ gates


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
        A, B = torch.cat(pairs[0::2]), torch.cat(pairs[1::2], dim=1)  # (R, in), (out, R)
        ranks = [a.shape[0] for a in pairs[0::2]]
        flat = x.reshape(-1, x.shape[-1])
        scale = None
        if any(s != 1 for s in scales):
            scale = torch.cat([torch.full((r,), float(s), dtype=A.dtype, device=A.device) for r, s in zip(ranks, scales)])
            B = B * scale
        inner = product(flat.to(A.dtype), A)  # (N, R)
        y = product(flat, weight, bias)
        y += product(inner, B)
        ctx.save_for_backward(flat, inner, A, B, weight)
        ctx.shape, ctx.ranks, ctx.scale, ctx.gates = x.shape, ranks, scale, gates
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable  # A, B and inner are saved as constants: a second derivative would silently be wrong
    def backward(ctx, grad):
        x, inner, A, B, weight = ctx.saved_tensors
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
        grad_A = product(grad_inner.t(), x.to(A.dtype).t())  # (R, in)
        grad_B = product(inner.t(), exact.t()).t()  # (out, R)
        if ctx.scale is not None:
            grad_B = grad_B * ctx.scale
        grads = []
        for gate, a, b in zip(ctx.gates, grad_A.split(ctx.ranks), grad_B.split(ctx.ranks, dim=1)):
            grads += [None, None] if gate.closed else [a, b]
        return grad_x, None, None, None, None, *grads


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


# ---------------------------------------------------------------------------------------- saving, loading, merging


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


def save_adapter(model: Decoder, path: str | Path) -> None:
    """Writes the branches, with kind, ranks, alphas, targets and stride in the file itself."""
    tensors = {name: t.contiguous().cpu() for name, t in adapter_tensors(model).items()}
    save_file(tensors, path, metadata={"adapter": json.dumps(asdict(model.adapter.spec))})


def spec_from_dict(values: dict) -> AdapterSpec:
    return AdapterSpec(
        values["kind"], tuple(Branch(**b) for b in values["branches"]), tuple(values["targets"]), values["stride"]
    )


def load_adapter(model: Decoder, path: str | Path, alpha: float | None = None, branch: str = "adapter") -> Decoder:
    """Attaches what a file holds: one that `save_adapter` wrote, or a folder or file in PEFT's layout.

    A PEFT folder's alpha comes from its adapter_config.json; a bare PEFT file says nothing of it, so it must be given.
    """
    path = Path(path)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    try:
        with safe_open(file, framework="pt", device=str(model.device)) as tensors:
            metadata = tensors.metadata() or {}
            state = {key: tensors.get_tensor(key) for key in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read adapter {file}: {error}") from error
    if "adapter" in metadata:
        attach(model, spec_from_dict(json.loads(metadata["adapter"])))
        set_adapter_tensors(model, state, str(file))
        return model
    config = path / "adapter_config.json"
    if config.is_file():
        values = json.loads(config.read_text())
        if values.get("use_dora") or values.get("use_rslora") or values.get("alpha_pattern") or values.get("rank_pattern"):
            raise ValueError(f"{config}: DoRA, rsLoRA and per-layer ranks are not supported")
        alpha = float(values["lora_alpha"])
    if alpha is None:
        raise ValueError(f"{file} does not say its alpha; pass alpha=... (its ranks are read from the shapes)")
    ours = {hf_name(name, model.config.family): name for name, _ in model.named_modules()}
    tensors, targets, layers = {}, set(), set()
    for key, tensor in state.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", key)
        if not match or match[1] not in ours:
            raise ValueError(f"{file}: {key} names no linear layer of this {model.config.family} model")
        name = ours[match[1]]
        targets.add(name.split(".")[-1])
        layers.add(int(re.search(r"layers\.(\d+)\.", name)[1]))
        tensors[f"{name}.{branch}.{match[2]}"] = tensor.float()
    ranks = {t.shape[0] for name, t in tensors.items() if name.endswith(".A")}
    stride = 1 if len(layers) == model.config.layers else 2
    if len(ranks) != 1 or layers != set(range(0, model.config.layers, stride)):
        raise ValueError(f"{file}: one rank and every (second) layer are supported, not ranks {ranks}, layers {layers}")
    attach(model, AdapterSpec("lora", (Branch(branch, ranks.pop(), alpha),), tuple(sorted(targets)), stride))
    set_adapter_tensors(model, tensors, str(file))
    return model


def export_peft(model: Decoder, branch: str, folder: str | Path, base_model: str = "") -> Path:
    """Writes one low-rank branch as a PEFT adapter: PeftModel.from_pretrained(base, folder) gives the same logits.

    The branch's present scale is not part of it: PEFT's alpha / r is.
    """
    spec = model.adapter.spec
    chosen = [b for b in spec.branches if b.name == branch and b.rank]
    if spec.kind != "lora" or not chosen:
        raise ValueError(
            f"PEFT's layout holds a low-rank branch with rank above 0; {branch!r} of this {spec.kind} adapter is none"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = model.config.family
    state, modules = {}, []
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            name = hf_name(path, family)
            modules.append(name)
            part = module.parts[branch]
            state[f"base_model.model.{name}.lora_A.weight"] = part.A.detach().contiguous().cpu()
            state[f"base_model.model.{name}.lora_B.weight"] = part.B.detach().contiguous().cpu()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": chosen[0].rank, "lora_alpha": chosen[0].alpha,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": family == "gpt2", "inference_mode": True,
        "base_model_name_or_path": base_model, "target_modules": modules,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


@torch.no_grad()
def merge(model: Decoder, **scales: float) -> Decoder:
    """A plain decoder with the branches merged at the present or given scales; the model itself is unchanged.

    Low-rank branches are added to the weights. Gated MLP branches are units like the base's own, so they widen the MLP:
    this needs a gated SiLU family without biases there, and branches on every layer. Raises ValueError otherwise.
    """
    with scaled(model, **scales):
        plain = copy.deepcopy(model)
    spec = plain.adapter.spec
    config = plain.config
    if spec.kind == "mlp":
        if not config.gated_mlp or config.activation != "silu" or config.mlp_bias or spec.stride != 1:
            raise ValueError("gated MLP branches merge only into a SiLU-gated MLP without biases, on every layer")
        extra = sum(b.rank for b in spec.branches)
        config = replace(config, ffn=config.ffn + extra)
    for layer in plain.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, LoRALinear):
                    A, B = module.low_rank()
                    module.base.weight.copy_((module.base.weight + B @ A).to(module.base.weight.dtype))
                    setattr(part, name, module.base)
        if isinstance(layer.mlp, BranchedMLP):
            units, base = layer.mlp.parts, layer.mlp.base
            dtype = base.gate_proj.weight.dtype
            base.gate_proj.weight.data = torch.cat([base.gate_proj.weight, *[u.gate.to(dtype) for u in units.values()]])
            base.up_proj.weight.data = torch.cat([base.up_proj.weight, *[u.up.to(dtype) for u in units.values()]])
            downs = [(u.down * plain.adapter.scales[n]).to(dtype) for n, u in units.items()]
            base.down_proj.weight.data = torch.cat([base.down_proj.weight, *downs], dim=1)
            layer.mlp = base
    del plain.adapter
    plain.config = config
    return plain.requires_grad_(False)
