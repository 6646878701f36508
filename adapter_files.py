"""Branches as files: saved and loaded with all that describes them, in PEFT's layout, or merged into a plain decoder.

    save_adapter(model, "adapter.safetensors"); load_adapter(fresh_model, "adapter.safetensors")
    export_peft(model, "good", "peft_good")           # one branch; PeftModel.from_pretrained gives the same logits
    plain = merge(model, good=1, bad=0)               # a decoder without branches: model.save writes it for transformers
"""
import copy
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from adapters import (
    LINEAR_KINDS,
    AdapterSpec,
    Branch,
    BranchedMLP,
    DeltaSLinear,
    LoRALinear,
    adapter_tensors,
    attach,
    freeze_reference,
    scaled,
    set_adapter_tensors,
)
from model import Decoder, hf_name


def save_adapter(model: Decoder, path: str | Path) -> None:
    """Writes the branches, with kind, ranks, alphas, targets, stride and dropout in the file itself.

    A delta is coordinates in singular vectors, which are not in the file: fingerprints of them are.
    """
    tensors = {name: t.contiguous().cpu() for name, t in (adapter_tensors(model) | fingerprints(model)).items()}
    save_file(tensors, path, metadata={"adapter": json.dumps(asdict(model.adapter.spec))})


def fingerprints(model: Decoder) -> dict[str, torch.Tensor]:
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, DeltaSLinear))
    return {f"{path}.fingerprint": module.fingerprint() for path, module in layers}


def save_reference(model: Decoder, path: str | Path) -> None:
    """Writes what `freeze_reference` froze; a file that is there is whole."""
    save_adapter(model.adapter.frozen, f"{path}.tmp")
    Path(f"{path}.tmp").replace(path)


def load_reference(model: Decoder, path: str | Path) -> None:
    """Gives a model, whose adapter is attached, the reference policy that `save_reference` wrote. Raises ValueError for the file
    of another adapter."""
    freeze_reference(model)
    set_adapter_tensors(model.adapter.frozen, load_file(path), str(path))


def spec_from_dict(values: dict) -> AdapterSpec:
    return AdapterSpec(
        values["kind"], tuple(Branch(**b) for b in values["branches"]), tuple(values["targets"]), values["stride"],
        values.get("dropout", 0.0),  # files from before there was any lack it
    )  # fmt: skip


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
        mine = fingerprints(model)
        theirs = {name: state.pop(name) for name in mine if name in state}
        set_adapter_tensors(model, state, str(file))
        for name, values in mine.items():
            if name not in theirs or values.shape != theirs[name].shape or (values - theirs[name]).abs().max() > 0.05:
                layer = name.removesuffix(".fingerprint")
                raise ValueError(f"{file}: its deltas are of other singular vectors than {layer} has here: load the weights "
                                 "they were trained on, or the PEFT export of the branch, which holds its own")
        return model
    config, dropout = path / "adapter_config.json", 0.0
    if config.is_file():
        values = json.loads(config.read_text())
        if values.get("use_dora") or values.get("use_rslora") or values.get("alpha_pattern") or values.get("rank_pattern"):
            raise ValueError(f"{config}: DoRA, rsLoRA and per-layer ranks are not supported")
        alpha, dropout = float(values["lora_alpha"]), float(values.get("lora_dropout", 0.0))
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
    attach(model, AdapterSpec("lora", (Branch(branch, ranks.pop(), alpha),), tuple(sorted(targets)), stride, dropout))
    set_adapter_tensors(model, tensors, str(file))
    return model


def export_peft(model: Decoder, branch: str, folder: str | Path, base_model: str = "") -> Path:
    """Writes one low-rank branch as a PEFT adapter: PeftModel.from_pretrained(base, folder) gives the same logits.

    The branch's present scale is not part of it: PEFT's alpha / r is. A delta is written as the LoRA that it is, filled up with
    zeros to the largest rank of any layer.
    """
    spec = model.adapter.spec
    chosen = [b for b in spec.branches if b.name == branch and b.rank]
    if spec.kind not in LINEAR_KINDS or not chosen:
        raise ValueError(
            f"PEFT's layout holds a low-rank branch with rank above 0; {branch!r} of this {spec.kind} adapter is none"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = model.config.family
    layers = {hf_name(path, family): module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    pairs = {name: [side.detach() for side in module.pair(branch)] for name, module in layers.items()}
    rank, state = max(len(A) for A, _ in pairs.values()), {}
    for name, (A, B) in pairs.items():
        missing = rank - len(A)
        state[f"base_model.model.{name}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing)).contiguous().cpu()
        state[f"base_model.model.{name}.lora_B.weight"] = F.pad(B, (0, missing)).contiguous().cpu()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": chosen[0].alpha * (rank / chosen[0].rank),
        "lora_dropout": spec.dropout, "bias": "none", "fan_in_fan_out": family == "gpt2", "inference_mode": True,
        "base_model_name_or_path": base_model, "target_modules": list(layers),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


@torch.no_grad()
def merge(model: Decoder, **scales: float) -> Decoder:
    """A plain decoder with the branches merged at the present or given scales; the model itself is unchanged.

    Low-rank branches are added to the weights. Gated MLP branches are units like the base's own, so they widen the MLP:
    this needs a gated SiLU family without biases there, and branches on every layer. Raises ValueError otherwise, and for
    bundles, which no weight can hold.
    """
    if model.adapter.spec.kind == "bundles":
        raise ValueError("bundles are no linear map and merge into no weight: keep them beside it with save_adapter")
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
