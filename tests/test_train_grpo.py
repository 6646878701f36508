"""train_grpo.py and eval_run.py end to end, on folders laid out as the Hub would lay them out."""
import json
import re

import pytest
import torch
import tyro
from conftest import is_picture

import eval_run
import model as decoder
import train_grpo
from reward_specs import load_rewards

SMALL = ["--max_steps", "2", "--batch_size", "8", "--num_generations", "4", "--max_new_tokens", "10", "--eval_prompts", "12",
         "--logging_steps", "1", "--eval_routing_steps", "1", "--lora_config", "r2"]  # fmt: skip


def run(tmp_path, *flags) -> dict:
    folder = tmp_path / "run"
    assert train_grpo.main([*SMALL, "--output_dir", str(folder), *flags]) == 0
    return json.loads((folder / "verdict.json").read_text())


def simplestories(tmp_path, data_dir):
    """A random 4-layer, 128-wide, 4-head LLaMA with the SimpleStories tokenizer, as its Hub folder would look."""
    torch.manual_seed(0)
    config = decoder.ModelConfig("llama", 4096, 128, 4, 4, 4, 32, 512, 512, 1e-6, rotary_dim=32)
    folder = decoder.save(decoder.Decoder(config), tmp_path / "simplestories", hf_extra={"bos_token_id": 1, "eos_token_id": 1})
    (folder / "tokenizer.json").write_bytes((data_dir / "tokenizers" / "simplestories" / "tokenizer.json").read_bytes())
    return folder


def test_the_seed_experiment_on_a_random_model_and_the_real_prompts(tmp_path, data_dir, painted):
    folder = simplestories(tmp_path, data_dir)
    verdict = run(
        tmp_path, "--config", "configs/simplestories.yaml", "--model", str(folder), "--column", "prompt",
        "--dataset", str(data_dir / "datasets" / "simplestories_prompts"),
    )  # fmt: skip
    assert set(verdict) == {"modes", "wall_s", "steps"} and verdict["steps"] == 2
    assert list(verdict["modes"]) == ["untrained", "both", "retain_only", "forget_only", "deployed"]
    for row in verdict["modes"].values():
        assert {"task", "hack", "reward", "unique", "jaccard", "kl", "base_nll", "sample"} <= set(row)
        assert row["sample"] == row["sample"].lower()
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"^\[Sample @ 1\] \S", log, re.M) and re.search(r"^\[Sample @ 2\] \S", log, re.M)
    for name in ("curves.png", "adapter.safetensors", "config.yaml", "peft/good/adapter_model.safetensors", "checkpoint-2"):
        assert (tmp_path / "run" / name).exists(), name
    assert is_picture(tmp_path / "run" / "curves.png")


@pytest.mark.parametrize("flags", [["--routing", "none"], ["--routing", "dual", "--lora_config", "m2"], ["--lora_config", "full"],
                                   ["--routing", "dual", "--routing_mode", "exclusive", "--dtype", "bfloat16"],
                                   ["--routing", "dual", "--top_p", "0.9", "--top_k", "40", "--min_new_tokens", "3"],
                                   ["--loss_type", "dapo", "--num_iterations", "2", "--epsilon_high", "0.28"]])  # fmt: skip
def test_every_adapter_and_option_runs(tmp_path, flags):
    verdict = run(tmp_path, *flags)
    assert {"untrained", "both"} <= set(verdict["modes"])


def test_eval_run_gives_the_verdict_again(tmp_path, capsys):
    verdict = run(tmp_path, "--routing", "dual", "--bad_scale", "0.5")
    argv = ["--model_path", str(tmp_path / "run"), "--n", "12", "--n_samples", "3", "--eval_rewards", "happy_count"]
    eval_run.main(tyro.cli(eval_run.Args, args=argv, use_underscores=True))
    again = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text())["modes"]
    for mode, row in verdict["modes"].items():
        assert {k: again[mode][k] for k in row} == row
    out = capsys.readouterr().out
    assert "training history" in out and out.count("=== retain_only") == 1 and "happy_count" in out
    argv = ["--model_path", str(tmp_path / "run" / "checkpoint-2"), "--n", "12", "--no_routing_eval"]
    argv += ["--output_dir", str(tmp_path / "e")]
    eval_run.main(tyro.cli(eval_run.Args, args=argv, use_underscores=True))
    modes = json.loads((tmp_path / "e" / "eval.json").read_text())["modes"]
    assert list(modes) == ["untrained", "both"] and modes["both"]["task"] == verdict["modes"]["both"]["task"]
    with pytest.raises(ValueError, match="neither a run folder"):
        eval_run.find(tmp_path)


def test_a_copied_algorithm_gets_its_new_fields_as_flags(tmp_path, monkeypatch):
    source = (train_grpo.Path(train_grpo.__file__).parent / "rl_grpo.py").read_text()
    mine = source.replace("    seed: int = 42\n", "    seed: int = 42\n    my_field: float = 0.5\n")
    (tmp_path / "rl_mine.py").write_text(mine)
    monkeypatch.syspath_prepend(tmp_path)
    _, module, _, config = train_grpo.parse(["--algorithm", "rl_mine", "--my_field", "0.25"])
    assert module.__name__ == "rl_mine" and config.my_field == 0.25
    run(tmp_path, "--algorithm", "rl_mine", "--my_field", "0.25")
    assert "my_field: 0.25" in (tmp_path / "run" / "config.yaml").read_text()


def test_every_story_reward_has_a_known_name():
    assert train_grpo.Args().reward in load_rewards()
