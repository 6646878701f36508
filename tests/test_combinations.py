"""Everything combines: algorithms x adapters x routing x projection, two steps of each, or one line that says why not.

`TABLE` is the README's; each of its cells is walked for every algorithm, without and with projection.
"""
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import projector
import rl_grpo
import rl_gumbel
import rl_ppo
import rl_reinforce
import train_grpo
import training
from adapters import adapter_tensors, attach, preset
from envs import Scores
from model import Decoder, ModelConfig
from routing import SEPARATE

ALGORITHMS = {  # module, and what of its settings is not the default here
    "GRPO": (rl_grpo, {"num_generations": 4}), "PPO": (rl_ppo, {"num_minibatches": 2, "num_epochs": 1}),
    "REINFORCE": (rl_reinforce, {}), "GRADE": (rl_gumbel, {"top_p": 1.0, "min_new_tokens": 0}),
    "STE": (rl_gumbel, {"estimator": "ste", "top_p": 1.0, "min_new_tokens": 0}),
}  # fmt: skip
ADAPTERS = {  # --lora_config, and whether it has two branches (None: as --routing says)
    "LoRA": ("r2", False), "dual LoRA": ("r2", True), "dual MLP": ("m2", True), "δ_S": ("ds4", None),
    "bundles": ("bundles", None), "full": ("full", None),
}  # fmt: skip
ROUTING = ("none", "per sample", "per loss")
TABLE = """
| adapter | no routing | per sample | per loss |
|---|---|---|---|
| LoRA | all five | – (one branch) | – (no bundles) |
| dual LoRA | all five | all five | – (no bundles) |
| dual MLP | all five | all five | – (no bundles) |
| δ_S | all five | all five | – (no bundles) |
| bundles | all five | – (not good and bad) | PPO, REINFORCE, GRADE, STE |
| full | all five | – (no branches) | – (no bundles) |
"""
WHY = {  # a cell that runs nothing says which of these errors it stops with
    "one branch": "routing wants the branches good and bad; this lora adapter has adapter",
    "not good and bad": "bundles has no good and bad branch", "no branches": "full fine-tuning has no branches to route to",
    "no bundles": "routes to the branches of --lora_config bundles, not",
}  # fmt: skip


def cells() -> dict[tuple[str, str], str]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.strip().splitlines()[2:]]
    rows = {name: [cell.replace("all five", ", ".join(ALGORITHMS)) for cell in row] for name, *row in lines}
    return {(name, how): cell for name, row in rows.items() for how, cell in zip(ROUTING, row)}


# -------------------------------------------------------------------------------------------------------- a small world

EOS, VOCAB = 1, 7
TOKENIZER = SimpleNamespace(
    pad_id=0, eos_id=EOS, stop_ids=(EOS,), encode_prompt=lambda text: [int(c) for c in text],
    decode_completions=lambda prompts, completions: ["".join(map(str, c)) for c in completions],
)  # fmt: skip
PAIRS = [([2, 3], [2, 4 + i % 3, 3], [3, 4 + i % 3, 5]) for i in range(5)]  # prompt, hack, clean
SHAPES = {
    "llama": ModelConfig("llama", VOCAB, 16, 2, 4, 2, 4, 24, 32, tied=False, rotary_dim=4),
    "gpt2": ModelConfig("gpt2", VOCAB, 16, 2, 4, 4, 4, 32, 32, qkv_bias=True, out_bias=True, mlp_bias=True, gated_mlp=False,
                        rms_norm=False, activation="gelu_new"),
    "gpt_neox": ModelConfig("gpt_neox", VOCAB, 16, 2, 2, 2, 8, 32, 32, tied=False, rotary_dim=2, qkv_bias=True, out_bias=True,
                            mlp_bias=True, gated_mlp=False, rms_norm=False, parallel_residual=True, activation="gelu"),
}  # fmt: skip


class Worth:
    """Pays the mean worth of a completion's tokens, hard or soft; flagged are those that begin with an even one."""

    reward, worth = SimpleNamespace(name="worth"), torch.tensor([0.0, 0.1, 0.9, 0.2, 0.8, 0.3, 0.5])

    def prompts(self, split):
        return ["2", "345", "43", "5"]

    def score(self, prompts, completions, generator=None, recall=None):
        reward = torch.stack([self.worth[[int(c) for c in text]].mean() for text in completions])
        hack = torch.tensor([int(text[0]) % 2 == 0 for text in completions])
        return Scores(reward, reward, hack, hack.float(), hack, torch.ones_like(hack), hack, {})

    def soft_reward(self, prompts, ids, prompt_mask, soft, mask):
        return (soft @ self.worth * mask).sum(1) / mask.sum(1)


@pytest.fixture(autouse=True)
def short_pairs(monkeypatch):
    monkeypatch.setattr(projector, "authored", lambda *asked: (PAIRS[:4], PAIRS[4:]))


def trainer_of(algorithm: str, adapter: str, how: str, projected: bool, family: str = "llama"):
    """What can refuse a combination, in the order in which a script does it: Config, flags, adapter, Trainer."""
    (module, settings), (name, dual) = ALGORITHMS[algorithm], ADAPTERS[adapter]
    settings = {"batch_size": 8, "max_new_tokens": 4, "lr": 1e-2, "max_steps": 4, "beta": 0.05, "seed": 5} | settings
    settings |= {"routing": "dual"} if how == "per sample" else {}
    settings |= {"basis": "pairs", "projection": "no_gate"} if projected else {}
    if how == "per loss":
        settings |= {"loss_routes": "ssl_rl_separate"}
        settings |= {"kl_in": "loss"} if "kl_in" in {f.name for f in fields(module.Config)} else {}
    config = module.Config(**settings)
    training.check(train_grpo.Args(lora_config=name), config, ())
    torch.manual_seed(0)
    model = Decoder(SHAPES[family])
    torch.nn.init.normal_(model.head_weight, 0, 0.3)
    attach(model, preset(name, config.dual if dual is None else dual), seed=0)
    return module.Trainer(model, Worth(), TOKENIZER, config)


def two_steps(trainer) -> tuple[dict[str, float], set[str]]:
    """(metrics of the second step, branches that moved)."""
    before = {name: t.clone() for name, t in adapter_tensors(trainer.model).items()}
    for _ in range(2):
        metrics, sample = trainer.step()
        assert all(math.isfinite(value) for value in metrics.values()) and sample
    groups, after = trainer.model.adapter.groups, adapter_tensors(trainer.model)
    return metrics, {branch for branch, group in groups.items() if any(not torch.equal(after[n], before[n]) for n in group)}


# ------------------------------------------------------------------------------------------------------------ the walk


@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("how", ROUTING)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_cell_runs_or_says_why_not(algorithm, adapter, how, projected):
    cell = cells()[adapter, how]
    if algorithm == "GRPO" and how == "per loss":  # its KL is a term of its one loss
        assert "GRPO" not in cell and "loss_routes" not in {f.name for f in fields(rl_grpo.Config)}
        return
    if algorithm not in cell.split(", "):
        with pytest.raises(ValueError, match=WHY[cell.removeprefix("– (").removesuffix(")")]):
            trainer_of(algorithm, adapter, how, projected)
        return
    trainer = trainer_of(algorithm, adapter, how, projected)
    metrics, moved = two_steps(trainer)
    assert any(key.startswith("projection/") for key in metrics) == projected
    if how != "per loss":
        assert moved == set(trainer.model.adapter.groups), "every branch learns, and under routing from samples of its own"
    else:
        losses = set(trainer.router.table) & ({"policy_loss", "kl_loss"} | ({*rl_ppo.LOSSES} if algorithm == "PPO" else set()))
        assert moved == {branch for loss in losses for branch in SEPARATE[loss]}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("algorithm", ["GRPO", "PPO"])
def test_every_adapter_runs_on_gpt2_and_gpt_neox(algorithm, adapter, family):
    how = "per sample" if adapter.startswith("dual") else "none"
    trainer = trainer_of(algorithm, adapter, how, False, family)
    metrics, moved = two_steps(trainer)
    assert moved == set(trainer.model.adapter.groups) and metrics["logprob_gap"] < 1e-4


def test_the_readme_has_this_table():
    assert TABLE in (Path(training.__file__).parent / "README.md").read_text(encoding="utf-8")
