"""One decoder for five families of Hugging Face checkpoints: llama, qwen2, qwen3, gpt2, gpt_neox.

    model, folder = load("tiny")                      # the embedded model; also a local folder, or a Hub id
    logits = model(ids)                               # (B, T) -> (B, T, V)
    save(model, "my_model", tokenizer_from=folder)    # a folder that transformers loads back with equal logits

Modules keep the names that users know (q_proj, c_attn, query_key_value, ...): a projection that is fused in the
checkpoint stays fused here, so an adapter targets it by that name. Everything that differs between the families is
data in `ModelConfig`, or a name in the tables `PROJECTIONS` and `RENAMES`.

Departures from transformers: no dropout (RL wants the ratio of an unchanged policy to be exactly 1), no
generation_config (nobody asked for its temperature), and GPT-2's Conv1D weights are turned on loading into nn.Linear.
"""
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

ASSETS = Path(__file__).parent / "assets"
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox")

# ---------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder is. Sizes are counts, `head_dim` need not be width // heads (Qwen3-4B: 2560, 32 heads of 128)."""

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    norm_eps: float = 1e-5
    tied: bool = True
    rope_theta: float = 10000.0
    rotary_dim: int = 0  # 0: learned positions
    rope_scaling: tuple = ()  # (("factor", 8.0), ...) of llama3; empty: none
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    rms_norm: bool = True
    qk_norm: bool = False
    parallel_residual: bool = False
    activation: str = "silu"

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"num_attention_heads {self.heads} is no multiple of num_key_value_heads {self.kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(sorted(ACTIVATIONS))}")


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """Reads a Hugging Face config.json (as a dict). Raises ValueError for what this decoder does not do."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    # transformers 5 writes rope_parameters, earlier versions rope_theta + rope_scaling + rotary_pct
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.pop("rope_theta", hf.get("rope_theta", hf.get("rotary_emb_base", 10000.0)))
    partial = rope.pop("partial_rotary_factor", hf.get("rotary_pct", 0.25))  # gpt_neox alone reads it
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported; known: default, llama3")
    scaling = tuple(sorted(rope.items())) if kind == "llama3" else ()
    needed = ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings")
    if kind == "llama3" and (absent := [key for key in needed if key not in rope]):
        raise ValueError(f"rope_type llama3 without {', '.join(absent)} in config.json")
    if hf.get("use_sliding_window"):
        raise ValueError("use_sliding_window is true: sliding-window attention is not supported")
    if family == "gpt2":
        if hf.get("scale_attn_by_inverse_layer_idx") or not hf.get("scale_attn_weights", True):
            raise ValueError("gpt2 with unusual attention scaling is not supported")
        width, heads = hf["n_embd"], hf["n_head"]
        return ModelConfig(
            family, hf["vocab_size"], width, hf["n_layer"], heads, heads, width // heads, hf.get("n_inner") or 4 * width,
            hf["n_positions"], hf.get("layer_norm_epsilon", 1e-5), hf.get("tie_word_embeddings", True), qkv_bias=True,
            out_bias=True, mlp_bias=True, gated_mlp=False, rms_norm=False,
            activation=hf.get("activation_function", "gelu_new"),
        )  # fmt: skip
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if family == "gpt_neox":
        head_dim = width // heads
        bias = hf.get("attention_bias", True)
        return ModelConfig(
            family, hf["vocab_size"], width, hf["num_hidden_layers"], heads, heads, head_dim, hf["intermediate_size"],
            hf["max_position_embeddings"], hf.get("layer_norm_eps", 1e-5), hf.get("tie_word_embeddings", False), theta,
            int(head_dim * partial), scaling, bias, bias, True, gated_mlp=False, rms_norm=False,
            parallel_residual=hf.get("use_parallel_residual", True), activation=hf.get("hidden_act", "gelu"),
        )  # fmt: skip
    head_dim = hf.get("head_dim") or width // heads
    bias = hf.get("attention_bias", False)
    return ModelConfig(
        family, hf["vocab_size"], width, hf["num_hidden_layers"], heads, hf.get("num_key_value_heads") or heads, head_dim,
        hf["intermediate_size"], hf["max_position_embeddings"], hf.get("rms_norm_eps", 1e-6),
        hf.get("tie_word_embeddings", False), theta, head_dim, scaling, True if family == "qwen2" else bias,
        False if family == "qwen2" else bias, hf.get("mlp_bias", False), qk_norm=family == "qwen3",
        activation=hf.get("hidden_act", "silu"),
    )  # fmt: skip


def config_to_hf(c: ModelConfig) -> dict:
    """The config.json that transformers reads; the inverse of `config_from_hf`."""
    hf = {"model_type": c.family, "vocab_size": c.vocab_size, "tie_word_embeddings": c.tied, "torch_dtype": "float32"}
    if c.family == "gpt2":
        return hf | {
            "architectures": ["GPT2LMHeadModel"], "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads,
            "n_inner": c.ffn, "n_positions": c.context, "layer_norm_epsilon": c.norm_eps,
            "activation_function": c.activation,
        }  # fmt: skip
    hf |= {
        "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "intermediate_size": c.ffn, "max_position_embeddings": c.context, "hidden_act": c.activation,
        "rope_theta": c.rope_theta,
    }  # fmt: skip
    if c.rope_scaling:
        hf["rope_scaling"] = {"rope_type": "llama3"} | dict(c.rope_scaling)
    if c.family == "gpt_neox":
        return hf | {
            "architectures": ["GPTNeoXForCausalLM"], "layer_norm_eps": c.norm_eps, "attention_bias": c.qkv_bias,
            "rotary_pct": c.rotary_dim / c.head_dim, "rotary_emb_base": c.rope_theta,
            "use_parallel_residual": c.parallel_residual,
        }  # fmt: skip
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    hf |= {
        "architectures": [names[c.family]], "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps, "attention_bias": c.qkv_bias,
    }  # fmt: skip
    if c.family == "llama":
        hf["mlp_bias"] = c.mlp_bias
    return hf


# the projections of each family, by the names users know; the first group reads the layer's input
PROJECTIONS = {
    "llama": {"qkv": ("q_proj", "k_proj", "v_proj"), "out": "o_proj", "up": ("gate_proj", "up_proj"), "down": "down_proj"},
    "gpt2": {"qkv": ("c_attn",), "out": "c_proj", "up": ("c_fc",), "down": "c_proj"},
    "gpt_neox": {"qkv": ("query_key_value",), "out": "dense", "up": ("dense_h_to_4h",), "down": "dense_4h_to_h"},
}
PROJECTIONS["qwen2"] = PROJECTIONS["qwen3"] = PROJECTIONS["llama"]


def projections(config: ModelConfig) -> dict:
    return PROJECTIONS[config.family]


# ----------------------------------------------------------------------------------------------------------- parts


def rope_table(config: ModelConfig, device=None) -> torch.Tensor:
    """cos and sin of every position, (context, 2, rotary_dim / 2), fp32."""
    half = config.rotary_dim // 2
    frequency = config.rope_theta ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
    if config.rope_scaling:  # llama3: long waves are slowed by `factor`, short ones kept, a ramp between
        s = dict(config.rope_scaling)
        low, high, old = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
        ramp = ((old * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (ramp + (1 - ramp) / s["factor"])
    angle = torch.arange(config.context, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), dim=1)


os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # rows vary from call to call: the usual 1,024 fill gigabytes
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x, weight, bias=None) -> torch.Tensor:
    """x W^T + b with no gradient recorded. x (..., in), weight (out, in), either of any stride.

    On a CPU this is oneDNN's product: torch's own in fp32 is MKL's, which leaves AVX-512 unused on AMD processors (measured
    on two Zen 4 cores: 450 GFLOP/s against 200). Where that kernel is missing, and in fp64 and on CUDA, it is F.linear.
    """
    if ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class FrozenLinear(torch.autograd.Function):
    """`product` with the gradient of x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return product(grad, ctx.saved_tensors[0].t()), None, None


class Linear(nn.Linear):
    """nn.Linear that takes the fast product while its weight is frozen."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """F.linear; the fast product where the weight needs no gradient."""
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    if weight.requires_grad or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return FrozenLinear.apply(x, weight, bias)


class Rotate(torch.autograd.Function):
    """Rotary embedding of x (B, T, H, D) by cos (B or 1, T, 1, R) and sin (B or 1, T, 1, R/2).

    Its backward is the opposite rotation.
    """

    @staticmethod
    def rotate(x, cos, sin, sign: int = 1):
        half = sin.shape[-1]
        if 2 * half == x.shape[-1]:
            y = x * cos
        else:  # partial rotary: the rest of the head passes
            y = x.clone(memory_format=torch.contiguous_format)
            y[..., : 2 * half] *= cos
        y[..., :half].addcmul_(x[..., half : 2 * half], sin, value=-sign)
        y[..., half : 2 * half].addcmul_(x[..., :half], sin, value=sign)
        return y

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotate.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.rotate(grad, cos, sin, -1), None, None


def attend(q, k, v, bias, causal: bool):
    """Grouped-query attention. q (B, H, T, D), k and v (B, KV, S, D), bias (B or 1, 1, T or 1, S) or None -> (B, H, T, D).

    CUDA training uses torch's fused kernels. Decoding (T = 1), and everything on a CPU, is two batched products over
    KV heads, which reads each key once for its whole group; on short sequences that is also several times faster than
    the CPU's fused kernel (bfloat16, 136 tokens: 9 ms against 50, forward and backward).
    """
    batch, heads, length, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if bias is None and causal and 1 < length < keys:  # behind a cache: torch's is_causal would count from the first key
        bias = causal_bias(length, keys, q.dtype, q.device)
    if q.is_cuda and length > 1:
        gqa = {"enable_gqa": True} if heads != groups else {}
        if bias is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **gqa)
        if gqa:  # the kernels that take a mask want one key head per query head
            k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    if bias is None and causal and length > 1:
        bias = causal_bias(length, keys, q.dtype, q.device)
    rows = heads // groups * length  # the queries of a group share its keys
    q, k, v = q.reshape(batch * groups, rows, dim), k.reshape(-1, keys, dim), v.reshape(-1, keys, dim)
    if bias is None:
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    else:
        bias = bias.to(q.dtype)[:, :, None].expand(-1, 1 if len(bias) == 1 else groups, heads // groups, length, -1)
        bias = bias.reshape(-1, rows, keys)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=dim**-0.5)
    probs = scores.softmax(-1, dtype=torch.float32 if q.is_cuda else None).to(v.dtype)
    return torch.bmm(probs, v).view(batch, heads, length, dim)


def causal_bias(length: int, keys: int, dtype, device) -> torch.Tensor:
    """(1, 1, length, keys): 0 where the query (the last `length` of `keys` positions) may look, the dtype's lowest where not."""
    allowed = torch.ones(length, keys, dtype=torch.bool, device=device).tril(keys - length)
    return torch.zeros(1, 1, length, keys, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)


class Cache:
    """Static key/value cache: `keys[l]`, `values[l]` (B, KV, L, D). `slot` (1-element tensor) is where the next token goes,
    `upto` how many slots attention reads; with T tokens at once (prefill) slots slot .. slot+T-1 are written."""

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype, device):
        shape = (batch, config.kv_heads, length, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.upto = 0

    def attend(self, layer: int, q, k, v, bias, causal: bool):
        """Writes k, v (B, KV, T, D), then `attend` of q (B, H, T, D) to all that is there."""
        keys, values = self.keys[layer], self.values[layer]
        slots = self.slot if k.shape[2] == 1 else self.slot + torch.arange(k.shape[2], device=k.device)
        keys.index_copy_(2, slots, k)
        values.index_copy_(2, slots, v)
        return attend(q, keys[:, :, : self.upto], values[:, :, : self.upto], bias, causal)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float, rms: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = None if rms else nn.Parameter(torch.zeros(width))
        self.width, self.eps, self.rms = (width,), eps, rms

    def forward(self, x):
        if self.rms:
            return F.rms_norm(x, self.width, self.weight, self.eps)
        return F.layer_norm(x, self.width, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = c, layer
        names = projections(c)
        self.inputs, self.output = names["qkv"], names["out"]
        widths = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
        for name, size in zip(self.inputs, widths if len(self.inputs) == 3 else [sum(widths)]):
            setattr(self, name, Linear(c.width, size, bias=c.qkv_bias))
        setattr(self, self.output, Linear(c.heads * c.head_dim, c.width, bias=c.out_bias))
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(c.head_dim, c.norm_eps, True), Norm(c.head_dim, c.norm_eps, True)

    def qkv(self, x, rope):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, KV, T, D), normed and rotated."""
        c = self.config
        shape = (*x.shape[:2], -1, c.head_dim)
        rotate = Rotate.apply if torch.is_grad_enabled() else Rotate.rotate
        if len(self.inputs) == 3:
            q, k, v = (getattr(self, name)(x).view(shape) for name in self.inputs)
        elif c.family == "gpt_neox":  # laid out head by head: q, k, v of head 0, then of head 1, ...
            q, k, v = getattr(self, self.inputs[0])(x).view(*x.shape[:2], c.heads, 3, c.head_dim).unbind(3)
        else:
            q, k, v = getattr(self, self.inputs[0])(x).view(shape).split((c.heads, c.kv_heads, c.kv_heads), dim=2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, rope, bias, causal, cache):
        q, k, v = self.qkv(x, rope)
        y = attend(q, k, v, bias, causal) if cache is None else cache.attend(self.layer, q, k, v, bias, causal)
        return getattr(self, self.output)(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gated, self.activation = c.gated_mlp, ACTIVATIONS[c.activation]
        names = projections(c)
        self.inputs, self.output = names["up"], names["down"]
        for name in self.inputs:
            setattr(self, name, Linear(c.width, c.ffn, bias=c.mlp_bias))
        setattr(self, self.output, Linear(c.ffn, c.width, bias=c.mlp_bias))

    def forward(self, x):
        y = [getattr(self, name)(x) for name in self.inputs]
        if self.gated:
            return getattr(self, self.output)(self.activation(y[0]) * y[1])
        return getattr(self, self.output)(self.activation(y[0]))


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, index: int):
        super().__init__()
        self.parallel = c.parallel_residual
        self.input_layernorm = Norm(c.width, c.norm_eps, c.rms_norm)
        self.self_attn = Attention(c, index)
        self.post_attention_layernorm = Norm(c.width, c.norm_eps, c.rms_norm)
        self.mlp = MLP(c)

    def forward(self, x, rope, bias, causal, cache):
        y = x + self.self_attn(self.input_layernorm(x), rope, bias, causal, cache)
        return y + self.mlp(self.post_attention_layernorm(x if self.parallel else y))


# --------------------------------------------------------------------------------------------------------- decoder


class Decoder(nn.Module):
    """The transformer. Random weights as GPT-2's: normal(0, .02), residual outputs divided by sqrt(2 * layers)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        if not config.rotary_dim:
            self.embed_positions = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = Norm(config.width, config.norm_eps, config.rms_norm)
        if not config.tied:
            self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        self.rope = None
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:
                residual = name.split(".")[-2] in (projections(config)["out"], projections(config)["down"])
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * config.layers) if residual else 0.02)
            elif name.endswith("bias") and not parameter.is_meta:
                nn.init.zeros_(parameter)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        """The dtype of base weights and activations; adapters stay fp32."""
        return self.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, C): the output embedding, tied or not."""
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def hidden(self, ids=None, attention_mask=None, position_ids=None, embeds=None, cache=None):
        """Final normed hidden states.

        ids (B, T) long, or embeds (B, T, C). attention_mask (B, T) bool, True where a token is real (left padding);
        None says that all are. position_ids (B, T): default counts the real tokens, on from the cache's. With a `cache`
        (see Cache) the T tokens are written there and attend to all that it holds.
        Returns (B, T, C). Raises ValueError when the sequence is longer than the context.
        """
        x = self.embed_tokens(ids) if embeds is None else embeds
        batch, length = x.shape[:2]
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit the model's context of {self.config.context}")
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
            else:
                position_ids = torch.arange(length, device=x.device)[None]  # (1, T)
                position_ids = position_ids if cache is None else position_ids + cache.slot
        bias = None
        if attention_mask is not None:
            bias = causal_bias(length, length, x.dtype, x.device)
            bias = bias.masked_fill(~attention_mask.bool()[:, None, None, :], torch.finfo(x.dtype).min)
        if self.config.rotary_dim:
            if self.rope is None or self.rope.device != x.device:
                self.rope = rope_table(self.config, x.device)
            cos, sin = self.rope[position_ids].to(x.dtype).unbind(2)  # (B or 1, T, R/2) each
            rope = (torch.cat((cos, cos), dim=-1)[:, :, None], sin[:, :, None])
        else:
            x, rope = x + self.embed_positions(position_ids), None
        for layer in self.layers:
            x = layer(x, rope, bias, True, cache)
        return self.norm(x)

    def forward(self, ids=None, attention_mask=None, position_ids=None, embeds=None, cache=None, logits_from: int = 0):
        """Logits (B, T - logits_from, V) of positions logits_from .. T-1; logits at t score token t + 1.

        Arguments as `hidden`. Logits are the memory (16 x 512 x 151,936 in fp32 is 5 GB): ask only for those you need.
        """
        x = self.hidden(ids, attention_mask, position_ids, embeds, cache)
        return linear(x[:, logits_from:], self.head_weight)


# ------------------------------------------------------------------------------------------------- loading, saving

RENAMES = {  # ours -> Hugging Face's, in this order
    "llama": [(r"^(?!lm_head)", "model.")],
    "gpt2": [
        (r"^embed_tokens", "transformer.wte"), (r"^embed_positions", "transformer.wpe"), (r"^norm\.", "transformer.ln_f."),
        (r"^layers\.", "transformer.h."), (r"\.self_attn\.", ".attn."), (r"\.input_layernorm\.", ".ln_1."),
        (r"\.post_attention_layernorm\.", ".ln_2."),
    ],
    "gpt_neox": [
        (r"^embed_tokens", "gpt_neox.embed_in"), (r"^norm\.", "gpt_neox.final_layer_norm."), (r"^layers\.", "gpt_neox.layers."),
        (r"\.self_attn\.", ".attention."), (r"^lm_head", "embed_out"),
    ],
}  # fmt: skip
RENAMES["qwen2"] = RENAMES["qwen3"] = RENAMES["llama"]
BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")  # not c_attn.bias


def hf_name(name: str, family: str) -> str:
    """Our parameter or module name as Hugging Face's (and so PEFT's) of that family."""
    for pattern, replacement in RENAMES[family]:
        name = re.sub(pattern, replacement, name)
    return name


def is_conv1d(name: str, config: ModelConfig) -> bool:
    """GPT-2 stores these weights as (in, out)."""
    return config.family == "gpt2" and bool(re.search(r"(c_attn|c_proj|c_fc)\.weight$", name))


def resolve(name: str) -> Path:
    """The folder of a model: `tiny` (and `random`), a local Hugging Face folder, or a Hub id (owner/name), which is downloaded.

    Raises ValueError where there is none, or where the folder holds no checkpoint.
    """
    folder = ASSETS / "tiny" if name in ("tiny", "random") else Path(name).expanduser()
    if not folder.is_dir():
        if name in ("tiny", "random") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
            raise ValueError(f"model {name!r}: no such folder (a local folder, a Hub id owner/name, tiny or random)")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
        except Exception as error:  # whatever the network or the Hub answers: say it in one line
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"model {name!r}: no such local folder, and the Hub did not serve it ({reason})") from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    return folder


def check_device(name: str) -> None:
    """Raises ValueError for a device that torch does not have here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a folder: model.safetensors, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} is no checkpoint: {file.name} is missing (weights are read from safetensors only)")
    return files


def load(name: str, dtype=torch.float32, device="cpu") -> tuple[Decoder, Path]:
    """A decoder with the weights of `tiny`, a local Hugging Face folder or a Hub id, and the folder they came from.

    `random` is `tiny` with random weights, always the same, for trials of what must run and need learn nothing.
    Raises ValueError for a folder that is no checkpoint, a truncated file, a missing, unexpected or misshapen weight.
    """
    folder = resolve(name)
    try:
        config = config_from_hf(read_json(folder / "config.json"))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} has no {error}") from error
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Decoder(config).to(device, dtype).requires_grad_(False), folder
    with torch.device("meta"):
        model = Decoder(config)
    wanted = {hf_name(ours, config.family): ours for ours in model.state_dict()}
    state, unexpected, head = {}, [], None
    for file in safetensors_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for key in tensors.keys():
                    theirs = f"transformer.{key}" if config.family == "gpt2" and not key.startswith("transformer.") else key
                    if BUFFERS.search(theirs):
                        continue
                    if theirs.removeprefix("transformer.") in ("lm_head.weight", "embed_out.weight") and config.tied:
                        head = tensors.get_tensor(key).to(dtype)
                    elif (ours := wanted.get(theirs) or wanted.get(key)) is None:
                        unexpected.append(key)
                    else:
                        tensor = tensors.get_tensor(key)
                        state[ours] = (tensor.t() if is_conv1d(ours, config) else tensor).to(dtype).contiguous()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {file}: {error} (truncated download?)") from error
    missing = [name for name in model.state_dict() if name not in state]
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not fit its config.json: missing {missing[:3]} ({len(missing)}), unexpected {unexpected[:3]} "
            f"({len(unexpected)})"
        )
    for ours, meta in model.state_dict().items():
        if state[ours].shape != meta.shape:
            raise ValueError(f"{folder}: {ours} has shape {tuple(state[ours].shape)}, config.json says {tuple(meta.shape)}")
    if head is not None and not torch.equal(head, state["embed_tokens.weight"]):
        raise ValueError(f"{folder}: tie_word_embeddings is true, yet lm_head differs from the embedding")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False), folder


def save(model: Decoder, folder: str | Path, tokenizer_from: str | Path | None = None, hf_extra: dict | None = None) -> Path:
    """Writes config.json and model.safetensors that transformers loads; copies the tokenizer's files from another folder.

    `hf_extra` is merged into config.json (bos_token_id, eos_token_id, ...). Raises ValueError for a model with branches.
    """
    with torch.device("meta"):
        plain = Decoder(model.config).state_dict()
    if foreign := sorted(set(model.state_dict()) ^ set(plain)):
        raise ValueError(f"{foreign[0]} is no weight of a plain model: save(merge(model), ...), or save_adapter for the branches")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_from is not None:
        source = Path(tokenizer_from)
        old = read_json(source / "config.json")
        hf_extra = {k: old[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in old} | (hf_extra or {})
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
            if (source / name).is_file() and source.resolve() != folder.resolve():
                (folder / name).write_bytes((source / name).read_bytes())
    config = config_to_hf(model.config) | (hf_extra or {})
    config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.t() if is_conv1d(name, model.config) else tensor
        state[hf_name(name, model.config.family)] = tensor.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
