"""Routing: gates touch parameter gradients only, one pass equals two, isolation is bitwise.

The reference is brute force: one sample at a time, unpadded, LoRA and the GRPO formula written out, plain autograd, and a
sum over the samples that a branch may learn from.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import rl_grpo
from adapters import (
    AdapterSpec,
    Branch,
    BranchedMLP,
    DeltaSLinear,
    LoRALinear,
    adapter_tensors,
    attach,
    branch_parameters,
    parameters_of,
    set_scales,
)
from losses import LOSS_TYPES, token_weights
from model import Decoder, ModelConfig
from routing import assert_isolated, clip_per_branch, gates, gradient_flow, hooked_shut, sample_routes, two_pass_backward
from sampling import Rollout

CONFIGS = {
    "llama": ModelConfig("llama", 19, 16, 2, 4, 2, 6, 24, 32, tied=True, rotary_dim=6),
    "gpt2": ModelConfig("gpt2", 19, 16, 2, 4, 4, 4, 32, 32, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True,
                        gated_mlp=False, rms_norm=False, activation="gelu_new"),
}  # fmt: skip
ALLOWED = {  # (mode, is_rh) -> the branches that learn from the sample
    ("classic", False): {"good", "bad"}, ("classic", True): {"bad"}, ("exclusive", False): {"good"}, ("exclusive", True): {"bad"},
}  # fmt: skip
MAX_NEW_TOKENS, TEMPERATURE, EPSILON, EPSILON_HIGH = 6, 0.8, 0.2, 0.28
SCALES = {"good": 0.8, "bad": 1.5}
ALPHAS = {"good": 4.5, "bad": 1.0}


@pytest.fixture(autouse=True)
def any_old_policy(monkeypatch):
    """The batches here come from a policy some way off, so that ratios clip; `update` refuses that on its first iteration."""
    monkeypatch.setattr(rl_grpo, "LOGPROB_GAP", dict.fromkeys((torch.float32, torch.float64), math.inf))


def policy(kind: str = "lora", family: str = "llama", dtype=torch.float32, fresh: bool = False) -> Decoder:
    """A small random decoder with random branches good (rank 3) and bad (rank 2), scales and alphas other than 1 and rank."""
    generator = torch.Generator().manual_seed(0)
    model = Decoder(CONFIGS[family])
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / math.sqrt(p.shape[1]) if p.dim() == 2 else p + 0.2 * noise)
    attach(model, AdapterSpec(kind, (Branch("good", 3, ALPHAS["good"]), Branch("bad", 2, ALPHAS["bad"]))), seed=1)
    if not fresh:
        for tensor in adapter_tensors(model).values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
        set_scales(model, **SCALES)
    return model.to(dtype)


class Recorder:
    """Stands where the optimizer stands in rl_grpo.update, and keeps the gradients that a step would take."""

    def __init__(self, model):
        self.model, self.gradients = model, None
        self.param_groups = [{"params": list(group.values())} for group in branch_parameters(model).values()]

    def zero_grad(self, set_to_none):
        for p in self.model.parameters():
            p.grad = None

    def step(self):
        self.gradients = {n: p.grad for g in branch_parameters(self.model).values() for n, p in g.items()}


def a_batch(model, samples: int = 7, prompt_width: int = 5, dtype=torch.float32):
    """Rollout, advantages and labels: prompts of 1 to 5 tokens left-padded, completions of 1 to 6, pi_old some way off."""
    generator = torch.Generator().manual_seed(7)
    vocab = model.config.vocab_size
    prompt_lengths = torch.tensor([5, 1, 3, 5, 2, 4, 3])[:samples]
    lengths = torch.tensor([6, 2, 1, 4, 6, 3, 5])[:samples]
    prompt_mask = torch.arange(prompt_width) >= prompt_width - prompt_lengths[:, None]
    mask = torch.arange(MAX_NEW_TOKENS) < lengths[:, None]
    prompts = torch.randint(0, vocab, prompt_mask.shape, generator=generator) * prompt_mask
    tokens = torch.randint(0, vocab, mask.shape, generator=generator) * mask
    old = torch.zeros(mask.shape, dtype=dtype)
    rollout = Rollout(prompts, prompt_mask, tokens, mask, old, None, torch.ones(samples, dtype=torch.bool))
    with torch.no_grad():
        for i in range(samples):
            noise = 0.3 * torch.randn(int(lengths[i]), generator=generator)  # ratios on both sides of both clips
            old[i, : lengths[i]] = sample_logprobs(model, rollout, i) + noise
    advantages = torch.randn(samples, generator=generator).to(dtype)
    is_rh = torch.tensor([True, False, False, True, False, True, False])[:samples]
    return rollout, advantages, is_rh


# --------------------------------------------------------------------------------------------------- the brute force


def plain_lora(self, x):
    y = F.linear(x, self.base.weight, self.base.bias)
    for name, part in self.parts.items():
        scale = self.adapter.scales[name] * ALPHAS[name] / part.A.shape[0]
        y = y + scale * (x @ part.A.t() @ part.B.t())
    return y


def plain_mlp(self, x):
    y = self.base(x)
    for name, part in self.parts.items():
        a = x @ part.gate.t()
        y = y + self.adapter.scales[name] * (a * torch.sigmoid(a) * (x @ part.up.t())) @ part.down.t()
    return y


def plain_delta(self, x):
    y = F.linear(x, self.base.weight, self.base.bias)
    for name, part in self.parts.items():
        r = len(part.delta)
        scale = self.adapter.scales[name] * ALPHAS[name] / r
        y = y + scale * (x @ self.V[:r].t() * part.delta) @ self.U[:, :r].t()
    return y


@pytest.fixture
def plain(monkeypatch):
    """Called, it swaps the adapters' forward for the formula written out, which knows no gates."""

    def swap():
        monkeypatch.setattr(LoRALinear, "forward", plain_lora)
        monkeypatch.setattr(DeltaSLinear, "forward", plain_delta)
        monkeypatch.setattr(BranchedMLP, "forward", plain_mlp)

    return swap


def sample_logprobs(model, rollout, i):
    """Log-probabilities of one completion, from its real tokens alone, at the temperature."""
    prompt, completion = rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.tokens[i][rollout.mask[i]]
    logits = model(torch.cat([prompt, completion])[None])[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1)[torch.arange(len(completion)), completion]


def brute_force(model, rollout, advantages, is_rh, loss_type, beta, mode):
    """Gradient by parameter name: the sum over samples of the gradients that the mode allows."""
    names = {n: (branch, p) for branch, g in branch_parameters(model).items() for n, p in g.items()}
    total = {n: torch.zeros_like(p) for n, (_, p) in names.items()}
    samples, tokens = rollout.mask.shape[0], int(rollout.mask.sum())
    clips = 0
    for i in range(samples):
        new, length = sample_logprobs(model, rollout, i), int(rollout.mask[i].sum())
        ratio, a = (new - rollout.logprobs[i, :length]).exp(), advantages[i]
        gain = (ratio.clamp(max=1 + EPSILON_HIGH) if a > 0 else ratio.clamp(min=1 - EPSILON)) * a
        clips += int((gain != ratio * a).sum())
        loss = -gain
        if beta:
            with torch.no_grad():
                scales, model.adapter.scales = model.adapter.scales, dict.fromkeys(SCALES, 0.0)
                ref = sample_logprobs(model, rollout, i)
                model.adapter.scales = scales
            loss = loss + beta * ((ref - new).exp() - (ref - new) - 1)
        divisor = {"grpo": length * samples, "bnpo": tokens, "dapo": tokens, "dr_grpo": samples * MAX_NEW_TOKENS}[loss_type]
        grads = torch.autograd.grad(loss.sum() / divisor, [p for _, p in names.values()])
        for (name, (branch, _)), grad in zip(names.items(), grads):
            if mode is None or branch in ALLOWED[mode, bool(is_rh[i])]:
                total[name] += grad
    assert clips > 2, "a batch in which nothing clips tests too little"
    return total


def config(loss_type="grpo", beta=0.05, mode="classic", size=0, **more):
    return rl_grpo.Config(
        routing="dual" if mode else "none", routing_mode=mode or rl_grpo.Config.routing_mode, beta=beta, max_grad_norm=0,
        micro_batch_size=size, loss_type=loss_type, temperature=TEMPERATURE, epsilon=EPSILON, epsilon_high=EPSILON_HIGH,
        max_new_tokens=MAX_NEW_TOKENS, **more,
    )  # fmt: skip


def one_pass(model, rollout, advantages, is_rh, settings):
    recorder = Recorder(model)
    rl_grpo.update(model, recorder, rollout, advantages, is_rh, settings)
    return recorder.gradients


def two_pass(model, rollout, advantages, is_rh, settings):
    """The slow reference: each homogeneous sub-batch's own mean, times its share of the batch."""
    law = settings.law()
    by_tokens = settings.loss_type in ("bnpo", "dapo")

    def loss_of(rows):
        valid = rollout.mask[rows]
        new = rl_grpo.score_rows(model, rollout, rows, law)
        ref = None
        if settings.beta:
            with torch.no_grad(), rl_grpo.reference(model) as base:
                ref = rl_grpo.score_rows(base, rollout, rows, law)
        a = advantages[rows][:, None].expand_as(valid)[valid]
        weights = rl_grpo.token_weights(valid, settings.loss_type, MAX_NEW_TOKENS)[valid]
        loss, _ = rl_grpo.grpo_loss(new, rollout.logprobs[rows][valid], ref, a, weights, settings.beta, EPSILON, EPSILON_HIGH)
        return loss * (int(valid.sum()) / int(rollout.mask.sum()) if by_tokens else len(rows) / len(rollout.mask))

    for p in model.parameters():
        p.grad = None
    two_pass_backward(model, loss_of, is_rh, settings.routing_mode)
    return {n: p.grad for g in branch_parameters(model).values() for n, p in g.items()}


def assert_same_gradients(mine, theirs, tolerance):
    """None counts as zero; the tolerance is absolute for gradients up to 1, relative to the largest above."""
    assert mine.keys() == theirs.keys()
    largest = max([1.0] + [g.abs().max().item() for g in theirs.values() if g is not None])
    for name, b in theirs.items():
        a = mine[name]
        gap = 0.0 if a is None and b is None else ((0 if a is None else a) - (0 if b is None else b)).abs().max()
        assert gap <= tolerance * largest, f"{name}: {gap:.2g}"


# ----------------------------------------------------------------------------------------- promise 4: one pass equals two


@pytest.fixture
def in_double(monkeypatch):
    """rl_grpo in fp64: losses.py keeps log-probabilities and weights in fp32, so these two are written out here."""

    def logprobs(hidden, weight, targets, temperature, support):
        assert support is None
        return F.log_softmax(hidden @ weight.t() / temperature, -1).gather(1, targets[:, None]).squeeze(1)

    def weights(mask, loss_type, max_new_tokens):
        m = mask.double()
        return {"grpo": m / m.sum(1, keepdim=True) / len(m), "dr_grpo": m / (len(m) * max_new_tokens)}.get(loss_type, m / m.sum())

    monkeypatch.setattr(rl_grpo, "token_logprobs", logprobs)
    monkeypatch.setattr(rl_grpo, "token_weights", weights)


@pytest.mark.parametrize("mode", ["classic", "exclusive"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kind, family", [("lora", "llama"), ("lora", "gpt2"), ("mlp", "llama"), ("delta_s", "gpt2")])
def test_one_pass_equals_two_and_brute_force(kind, family, loss_type, mode, plain):
    model = policy(kind, family)
    batch = a_batch(model)
    passes = [one_pass(model, *batch, config(loss_type, mode=mode, size=size)) for size in (1, 3, 7, 0)]
    reference = two_pass(model, *batch, config(loss_type, mode=mode))
    plain()
    truth = brute_force(model, *batch, loss_type, 0.05, mode)
    assert min(g.norm() for g in truth.values()) > 1e-4  # every branch has something to learn
    for gradients in (*passes, reference):
        assert_same_gradients(gradients, truth, 1e-6)
    for gradients in passes:
        assert_same_gradients(gradients, reference, 1e-6)


@pytest.mark.parametrize("mode", ["classic", "exclusive"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("kind, family", [("lora", "llama"), ("lora", "gpt2"), ("mlp", "llama"), ("delta_s", "gpt2")])
def test_one_pass_equals_two_and_brute_force_in_fp64(kind, family, loss_type, mode, plain, in_double):
    model = policy(kind, family, torch.float64)
    batch = a_batch(model, dtype=torch.float64)
    passes = [one_pass(model, *batch, config(loss_type, mode=mode, size=size)) for size in (1, 3, 7)]
    reference = two_pass(model, *batch, config(loss_type, mode=mode))
    plain()
    truth = brute_force(model, *batch, loss_type, 0.05, mode)
    for gradients in (*passes, reference):
        assert all(g is None or g.dtype == torch.float64 for g in gradients.values())
        assert_same_gradients(gradients, truth, 1e-12)


@pytest.mark.parametrize("labels", ["mixed", True, False])
@pytest.mark.parametrize("mode", ["classic", "exclusive"])
def test_the_two_pass_flag_trains_as_one_pass_does(mode, labels):
    model = policy("lora", "llama")
    rollout, advantages, is_rh = a_batch(model)
    flags = is_rh if labels == "mixed" else torch.full_like(is_rh, labels)
    one = one_pass(model, rollout, advantages, flags, config("bnpo", mode=mode, size=3))
    two = one_pass(model, rollout, advantages, flags, config("bnpo", mode=mode, size=3, passes=2))
    assert_same_gradients(two, one, 1e-6)
    assert {n for n, g in one.items() if g is None} == {n for n, g in two.items() if g is None}


@pytest.mark.parametrize("mode", ["classic", "exclusive", None])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_routing_off_and_beta_zero_against_brute_force(beta, mode, plain):
    model = policy()
    batch = a_batch(model)
    passes = [one_pass(model, *batch, config("grpo", beta, mode, size)) for size in (1, 3, 7)]
    plain()
    for gradients in passes:
        assert_same_gradients(gradients, brute_force(model, *batch, "grpo", beta, mode), 1e-6)


@pytest.mark.parametrize("mode", ["classic", "exclusive"])
@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("kind", ["lora", "mlp"])
def test_a_batch_of_one_label_leaves_no_gradient_in_protected_branches(kind, flagged, mode, plain):
    model = policy(kind)
    rollout, advantages, is_rh = a_batch(model)
    is_rh = torch.full_like(is_rh, flagged)
    learning = ALLOWED[mode, flagged]
    for size in (2, 0):
        gradients = one_pass(model, rollout, advantages, is_rh, config("grpo", mode=mode, size=size))
        for branch, group in branch_parameters(model).items():
            assert all((gradients[name] is not None) == (branch in learning) for name in group)
    two = two_pass(model, rollout, advantages, is_rh, config("grpo", mode=mode))
    plain()
    truth = brute_force(model, rollout, advantages, is_rh, "grpo", 0.05, mode)
    assert_same_gradients(gradients, truth, 1e-6)
    assert_same_gradients(two, truth, 1e-6)


def test_routes_by_hand():
    is_rh = torch.tensor([True, False, True])
    assert sample_routes(is_rh, "classic")["good"].tolist() == [0, 1, 0] and sample_routes(is_rh, "classic")["bad"] is None
    exclusive = sample_routes(is_rh, "exclusive")
    assert exclusive["good"].tolist() == [0, 1, 0] and exclusive["bad"].tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="unknown routing mode 'both'; known: classic, exclusive"):
        sample_routes(is_rh, "both")
    with pytest.raises(ValueError, match="unknown routing mode 'both'; known: classic, exclusive"):
        two_pass_backward(policy(), lambda rows: None, is_rh, "both")
    for labels in (is_rh.long(), is_rh.float()):
        with pytest.raises(ValueError, match="is_rh must be bool"):
            sample_routes(labels, "classic")


def test_hooks_of_the_two_pass_reference_are_removed():
    model = policy()
    with pytest.raises(RuntimeError), hooked_shut(model, ["good"]):
        raise RuntimeError
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    assert all(p.grad.norm() > 0 for p in parameters_of(model, "good"))


# --------------------------------------------------------- weights per token, soft and negative; gates read at backward


def per_position_gradients(model, ids, mask, loss_of):
    """Gradients (B, T, ...) by parameter name, from copies of each parameter per position, through plain autograd."""
    copies, owners = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, (LoRALinear, BranchedMLP)):
            owners[module] = path
            for branch, part in module.parts.items():
                for name, p in part.named_parameters():
                    copies[f"{path}.{branch}.{name}"] = p.detach().expand(*ids.shape, *p.shape).clone().requires_grad_()

    def times(x, p):  # x (B, T, in), p (B, T, out, in) -> (B, T, out)
        return (p @ x[..., None]).squeeze(-1)

    def lora(self, x):
        y = F.linear(x, self.base.weight, self.base.bias)
        for b in self.parts:
            A, B = (copies[f"{owners[self]}.{b}.{n}"] for n in "AB")
            y = y + self.adapter.scales[b] * ALPHAS[b] / A.shape[-2] * times(times(x, A), B)
        return y

    def mlp(self, x):
        y = self.base(x)
        for b in self.parts:
            gate, up, down = (copies[f"{owners[self]}.{b}.{n}"] for n in ("gate", "up", "down"))
            y = y + self.adapter.scales[b] * times(F.silu(times(x, gate)) * times(x, up), down)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRALinear, "forward", lora)
        patch.setattr(BranchedMLP, "forward", mlp)
        return dict(zip(copies, torch.autograd.grad(loss_of(model(ids, mask)), list(copies.values()))))


def weights_of(kind: str, shape):
    generator = torch.Generator().manual_seed(11)
    soft = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {
        "token": soft.abs().clamp(max=1), "negative token": soft, "hard token": (soft > 0).double(), "sample": soft[:, 0],
        "hard sample": (torch.arange(shape[0]) == 1).double(), "number": 0.37, "negative number": -0.5, "closed": 0.0,
        "open": None, "scalar": torch.tensor(0.25, dtype=torch.float64), "bool token": soft > 0,
    }[kind]  # fmt: skip


HARD, SOFT = ("hard token", "bool token", "hard sample"), ("token", "sample", "number", "scalar")


@pytest.mark.parametrize("good", [*HARD, *SOFT, "negative token", "negative number"])
@pytest.mark.parametrize("bad", ["open", "closed", "negative token", "sample"])
@pytest.mark.parametrize("kind, family", [("lora", "llama"), ("lora", "gpt2"), ("mlp", "llama")])
def test_gate_weights_against_a_sum_over_positions(kind, family, good, bad):
    model = policy(kind, family, torch.float64)
    ids = torch.randint(0, 19, (3, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, :2] = False
    names = {n: (b, p) for b, group in branch_parameters(model).items() for n, p in group.items()}

    def loss_of(logits):
        return logits[:, -3:].log_softmax(-1)[..., 4].sum()

    positions = per_position_gradients(model, ids, mask, loss_of)
    weights = {"good": weights_of(good, ids.shape), "bad": weights_of(bad, ids.shape)}
    with gates(model, **weights):
        loss_of(model(ids, mask)).backward()
    for name, (branch, p) in names.items():
        w = weights[branch]
        if isinstance(w, float) and w == 0:
            assert p.grad is None
            continue
        w = torch.as_tensor(1.0 if w is None else w, dtype=torch.float64)
        w = (w[:, None] if w.dim() == 1 else w).expand(ids.shape)
        expected = (positions[name] * w[..., None, None]).sum((0, 1))
        assert (p.grad - expected).abs().max() < 1e-12 * max(1, expected.abs().max()), name


@pytest.mark.parametrize("kind", ["lora", "mlp"])
def test_gates_are_read_when_backward_runs(kind):
    """One forward, three losses, three routes: each loss reaches its branch, as three separate forwards would have it."""
    model = policy(kind, dtype=torch.float64)
    ids = torch.randint(0, 19, (3, 6), generator=torch.Generator().manual_seed(3))
    named = {n: (b, p) for b, group in branch_parameters(model).items() for n, p in group.items()}
    rows = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)

    def losses():
        logits = model(ids)
        return logits.square().mean(), logits.log_softmax(-1)[..., 3].sum(), logits[:, :, 5].sum()

    apart = [torch.autograd.grad(losses()[k], [p for _, p in named.values()]) for k in (0, 1)]
    only = torch.autograd.grad(model(ids[rows > 0])[:, :, 5].sum(), [p for _, p in named.values()])
    with gates(model, good=0.0, bad=0.0):
        first, second, third = losses()  # gates at forward time are nobody's business
    with gates(model, good=1.0, bad=0.0):
        first.backward(retain_graph=True)
    assert all(p.grad is None for p in parameters_of(model, "bad"))
    with gates(model, good=0.0, bad=2.0):
        second.backward(retain_graph=True)
    with gates(model, good=-rows, bad=0):
        third.backward()
    for i, (branch, p) in enumerate(named.values()):
        expected = apart[0][i] - only[i] if branch == "good" else 2 * apart[1][i]
        assert (p.grad - expected).abs().max() < 1e-12 * max(1, expected.abs().max())


# ------------------------------------------------------------------------- promise 2: parameter gradients and nothing else


@pytest.mark.parametrize("kind, family", [("lora", "llama"), ("lora", "gpt2"), ("mlp", "llama"), ("mlp", "gpt2"),
                                          ("delta_s", "gpt2")])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_change_no_bit_of_the_forward_values_nor_of_the_input_gradient(kind, family, dtype):
    model = policy(kind, family)
    for module in model.modules():  # the base alone: branches stay fp32, as after load(..., dtype) and attach
        for name, p in module._parameters.items():
            if p is not None and not p.requires_grad:
                module._parameters[name] = torch.nn.Parameter(p.to(dtype), requires_grad=False)
    assert model.dtype == dtype
    embeds = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()

    def values():
        logits = model(embeds=embeds)
        embeds.grad = None
        logits.float().square().sum().backward()
        return logits, embeds.grad

    logits, grad = values()
    for weight in (0.0, 0.5, -2.0, torch.tensor([1.0, 0, 0]), torch.zeros(3), torch.randn(3, 5)):
        for routes in ({"good": weight}, {"bad": weight}, {"good": weight, "bad": weight}):
            with gates(model, **routes):
                again, again_grad = values()
            assert torch.equal(again, logits) and torch.equal(again_grad, grad)


@pytest.mark.parametrize("kind", ["lora", "mlp", "delta_s"])
@pytest.mark.parametrize("weight", [0, 0.0, torch.zeros(2), torch.zeros(2, 4), torch.tensor(0.0), torch.zeros(2) > 0])
def test_weight_zero_leaves_grad_as_it_was(kind, weight):
    model = policy(kind)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with gates(model, good=weight):
        model(ids).square().sum().backward()
    assert all(p.grad is None for p in parameters_of(model, "good"))
    assert all(p.grad is not None for p in parameters_of(model, "bad"))
    for p in parameters_of(model, "good"):
        p.grad = torch.full_like(p, 3.0)
    with gates(model, good=weight):
        model(ids).square().sum().backward()
    assert all(bool((p.grad == 3).all()) for p in parameters_of(model, "good"))


def test_gates_come_back_and_nest():
    model = policy()
    weights = {name: gate for name, gate in model.adapter.gates.items()}
    rows = torch.tensor([0.5, 0.2])
    with gates(model, good=0.0):
        with pytest.raises(KeyError), gates(model, bad=rows):
            assert weights["good"].weight == 0 and torch.equal(weights["bad"].weight, rows)
            raise KeyError
        assert weights["good"].weight == 0 and weights["bad"].weight is None  # the inner block opens no outer gate
        with gates(model, good=None):
            assert weights["good"].weight is None
        assert weights["good"].weight == 0
    assert weights["good"].weight is None and weights["bad"].weight is None
    with pytest.raises(ValueError, match="no branch 'ugly' to route to; this adapter has good, bad"), gates(model, ugly=0):
        pass
    with pytest.raises(ValueError, match="do not fit a batch"), gates(model, good=torch.rand(5)):
        model(torch.tensor([[1, 2], [3, 4]])).sum().backward()


# ------------------------------------------------------------------------------------------ promise 3: isolation is bitwise


def optimizers(model, name):
    groups = [{"params": list(group.values())} for group in branch_parameters(model).values()]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.05, weight_decay=0.3)
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.3, nesterov=name == "nesterov")


@pytest.mark.parametrize("kind, family", [("lora", "llama"), ("mlp", "llama"), ("lora", "gpt2"), ("delta_s", "llama")])
@pytest.mark.parametrize("name", ["adamw", "sgd", "nesterov"])
@pytest.mark.parametrize("mode", ["classic", "exclusive"])
@pytest.mark.parametrize("size", [0, 3])
def test_isolation_is_bitwise_with_momentum_and_weight_decay(kind, family, name, mode, size):
    """Mixed steps fill the moments; then all samples are of one label, and what that protects does not move by a bit."""
    model = policy(kind, family)
    rollout, advantages, is_rh = a_batch(model)
    optimizer = optimizers(model, name)
    settings = config("dr_grpo", mode=mode, size=size, num_iterations=2)
    settings.max_grad_norm = 0.5
    for labels in ("mixed", "mixed", True, True, True, "mixed", False, True, False):
        before = {n: t.clone() for n, t in adapter_tensors(model).items()}
        flags = is_rh if labels == "mixed" else torch.full_like(is_rh, labels)
        learning = {"good", "bad"} if labels == "mixed" else ALLOWED[mode, labels]
        with assert_isolated(model, *({"good", "bad"} - learning)):
            rl_grpo.update(model, optimizer, rollout, advantages, flags, settings)
        for branch, group in branch_parameters(model).items():
            for n, p in group.items():
                assert torch.equal(p, before[n]) == (branch not in learning), (labels, n)
                if branch not in learning:
                    assert p.grad is None and optimizer.state[p]  # the moments are there, and wait


def test_assert_isolated_catches_leaks():
    model = policy()
    good, bad = parameters_of(model, "good")[0], parameters_of(model, "bad")[0]
    with torch.no_grad():
        with assert_isolated(model, "good"):
            bad.add_(1e-3)
        with pytest.raises(AssertionError, match="1 protected tensors moved, layers.0.*good"), assert_isolated(model, "good"):
            good[0, 0] = torch.nextafter(good[0, 0], torch.tensor(9.0))  # the smallest step there is
        for tensor in (model.embed_tokens.weight, model.norm.weight, model.layers[1].mlp.up_proj.base.weight):
            with pytest.raises(AssertionError, match="1 protected"), assert_isolated(model):  # frozen: always guarded
                tensor.view(-1)[0] += 1
        with pytest.raises(KeyError), assert_isolated(model, "good"):  # an error of the block's own is not hidden
            good.add_(1)
            raise KeyError
    with pytest.raises(ValueError, match="no branch 'ugly'; this adapter has good, bad"), assert_isolated(model, "ugly"):
        pass


def test_zeros_instead_of_none_would_leak():
    """Why a closed gate leaves None: the same step with zero gradients moves the protected branch by decay and momentum."""
    model = policy()
    rollout, advantages, is_rh = a_batch(model)
    optimizer = optimizers(model, "adamw")
    rl_grpo.update(model, optimizer, rollout, advantages, is_rh, config())
    for p in parameters_of(model, "good"):
        p.grad = torch.zeros_like(p)
    with pytest.raises(AssertionError, match="protected tensors moved"), assert_isolated(model, "good"):
        optimizer.step()


# --------------------------------------------------------------------------------------------------- norms and clipping


@pytest.mark.parametrize("kind", ["lora", "mlp"])
def test_gradient_flow_by_hand(kind):
    model = policy(kind)
    assert gradient_flow(model) == {"good": 0.0, "bad": 0.0}
    good = parameters_of(model, "good")
    good[0].grad, good[1].grad = torch.zeros_like(good[0]), torch.zeros_like(good[1])
    good[0].grad[0, 0], good[1].grad[0, 0] = 3.0, -4.0
    assert gradient_flow(model) == {"good": 5.0, "bad": 0.0}
    for p in model.parameters():
        p.grad = None
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    for branch, norm in gradient_flow(model).items():
        by_hand = sum(float(p.grad.double().square().sum()) for p in parameters_of(model, branch)) ** 0.5
        assert abs(norm / by_hand - 1) < 1e-6


def test_clipping_one_branch_leaves_the_other_alone():
    for large, small in (("good", "bad"), ("bad", "good")):
        model = policy()
        model(torch.tensor([[1, 2, 3]])).square().sum().backward()
        for branch, norm in ((large, 7.0), (small, 0.9)):
            flow = gradient_flow(model)[branch]
            for p in parameters_of(model, branch):
                p.grad.mul_(norm / flow)
        before = {n: p.grad.clone() for g in branch_parameters(model).values() for n, p in g.items()}
        norms = clip_per_branch(model, 1.0)
        assert norms[large] == pytest.approx(7, rel=1e-5) and norms[small] == pytest.approx(0.9, rel=1e-5)
        assert gradient_flow(model)[large] == pytest.approx(1, rel=1e-5)
        for name, p in branch_parameters(model)[small].items():
            assert torch.equal(p.grad, before[name])
        for name, p in branch_parameters(model)[large].items():  # a clipped gradient keeps its direction
            assert torch.allclose(p.grad, before[name] / 7, rtol=1e-4)


def test_clip_norm_zero_clips_nothing_and_none_stays_none():
    model = policy()
    with gates(model, bad=0):
        (1e4 * model(torch.tensor([[1, 2, 3]])).square().sum()).backward()
    before = [p.grad.clone() for p in parameters_of(model, "good")]
    norms = clip_per_branch(model, 0)
    assert norms["good"] > 1e3 and norms["bad"] == 0
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters_of(model, "good"), before))
    clip_per_branch(model, 1)
    assert all(p.grad is None for p in parameters_of(model, "bad"))


def test_the_clip_of_update_is_per_branch():
    """The step of the honest branch is bitwise the same, however large the flagged samples' gradient is."""
    rollout, advantages, is_rh = a_batch(policy())
    moved = []
    for factor in (1.0, 1e4):
        model = policy()
        settings = config(mode="exclusive", size=0, beta=0.0)
        settings.max_grad_norm = 1e-3
        scaled_advantages = torch.where(is_rh, factor * advantages, advantages)
        rl_grpo.update(model, optimizers(model, "adamw"), rollout, scaled_advantages, is_rh, settings)
        moved.append([p.detach().clone() for p in parameters_of(model, "good")])
    assert all(torch.equal(a, b) for a, b in zip(*moved))


def test_allowed_branches_learn_from_a_fresh_adapter():
    """Both sides at zero would pass every isolation test: here a mixed batch must move every branch."""
    model = policy(fresh=True)
    rollout, advantages, is_rh = a_batch(model)
    for mode in ("classic", "exclusive"):
        rl_grpo.update(model, Recorder(model), rollout, advantages, is_rh, config(mode=mode))
        assert all(norm > 1e-4 for norm in gradient_flow(model).values())


def test_a_rollout_with_micro_batches_of_any_size_has_the_same_weights():
    """The normaliser belongs to the batch: weights of the parts are rows of the weights of the whole."""
    rollout, *_ = a_batch(policy())
    for loss_type in LOSS_TYPES:
        weights = token_weights(rollout.mask, loss_type, MAX_NEW_TOKENS)
        for size in (1, 3, 7, 0):
            parts = rl_grpo.micro_batches(rollout, size, None)
            assert sorted(torch.cat(parts).tolist()) == list(range(7))
            assert sum(float(weights[rows].sum()) for rows in parts) == pytest.approx(float(weights.sum()), rel=1e-6)
        total = 27 / 42 if loss_type == "dr_grpo" else 1  # lengths 6 2 1 4 6 3 5: 27 tokens of 7 * 6
        assert float(weights.sum()) == pytest.approx(total)
