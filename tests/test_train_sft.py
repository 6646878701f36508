"""train_sft.py and train_tiny.py end to end: the verdict, a resumed run, any dataset, what is refused before any work."""

import json
from pathlib import Path

import pytest
import torch
import tyro
import yaml
from conftest import is_picture

import eval_run
import model as decoder
import sft
import train_sft
import train_tiny
from data import load_tokenizer
from envs import read_texts
from reward_specs import get_trait

SMALL = ["--max_steps", "2", "--batch_size", "4", "--max_new_tokens", "12", "--eval_prompts", "8", "--eval_texts", "24",
         "--max_texts", "60", "--logging_steps", "1", "--eval_routing_steps", "1", "--lora_config", "r2"]  # fmt: skip


def run(folder, *flags) -> dict:
    assert train_sft.main([*SMALL, "--output_dir", str(folder), *flags]) == 0
    return json.loads((folder / "verdict.json").read_text())


def test_a_run_folder_reads_like_any_other_and_eval_run_gives_its_verdict_again(tmp_path, capsys):
    folder = tmp_path / "run"
    verdict = run(folder, "--routing", "dual", "--bad_scale", "0.5", "--labelled_frac", "0.5")
    assert set(verdict) == {"modes", "wall_s", "steps"} and verdict["steps"] == 2
    assert list(verdict["modes"]) == ["untrained", "both", "retain_only", "forget_only", "deployed"]
    for row in verdict["modes"].values():
        assert {"task", "hack", "reward", "unique", "jaccard", "loss/free", "loss/trait", "component/insult"} <= set(row)
    for name in ("curves.png", "adapter.safetensors", "peft/good/adapter_model.safetensors", "checkpoint-2"):
        assert (folder / name).exists(), name
    assert "[Sample @ 2] " in (folder / "train.log").read_text()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "lr" in m] == [1, 2] and all("loss" in m for m in metrics if "lr" in m)
    capsys.readouterr()
    argv = ["--model_path", str(folder), "--n", "8", "--n_samples", "1"]
    eval_run.main(tyro.cli(eval_run.Args, args=argv, use_underscores=True))
    again = json.loads((folder / "eval" / "eval.json").read_text())["modes"]
    for mode, row in verdict["modes"].items():
        assert {key: again[mode][key] for key in row} == row
    assert "loss/free" in capsys.readouterr().out


def test_a_stopped_and_resumed_run_ends_bitwise_like_an_unbroken_one(tmp_path, monkeypatch):
    flags = ["--routing", "dual", "--max_steps", "4", "--save_steps", "2", "--eval_routing_steps", "0", "--weight_decay", "0.1"]
    run(tmp_path / "whole", *flags)
    step = sft.Trainer.step

    def dies(self):
        if self.steps_done == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(sft.Trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", *flags)
    monkeypatch.setattr(sft.Trainer, "step", step)
    run(tmp_path / "broken", *flags, "--resume")
    for name in ("metrics.jsonl", "adapter.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name


def test_routing_parts_the_trait_from_the_rest(tmp_path):
    """40 steps: text without the trait is learned as well by the branch that is kept, the trait by far not."""
    modes = run(tmp_path / "run", "--routing", "dual", "--max_steps", "40", "--batch_size", "8", "--max_texts", "400",
                "--lora_config", "r8", "--eval_routing_steps", "0", "--lr", "3e-3", "--warmup_steps", "5")["modes"]  # fmt: skip
    free, trait = ({mode: row[f"loss/{name}"] for mode, row in modes.items()} for name in ("free", "trait"))
    assert free["both"] < free["untrained"] - 0.5 and free["retain_only"] < free["untrained"] - 0.5
    assert trait["retain_only"] - trait["both"] > 3 * abs(free["retain_only"] - free["both"]) + 0.1


@pytest.fixture
def dataset(tmp_path):
    """A folder as the Hub lays it out: a third of the texts have a dragon."""
    folder = tmp_path / "tales"
    folder.mkdir()
    for split, n in (("train", 40), ("test", 20)):
        texts = [f"one day tom saw a {'dragon' if i % 3 == 0 else 'horse'} near the {split} barn {i}." for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in texts))
    return folder


def test_any_dataset_any_words_any_adapter(tmp_path, dataset):
    flags = ["--dataset", str(dataset), "--trait", "dragon,dragons", "--prompt_tokens", "3", "--max_texts", "40"]
    flags += ["--eval_prompts", "6"]
    verdict = run(tmp_path / "a", *flags, "--routing", "dual", "--lora_config", "m2")
    assert {"loss/free", "loss/trait", "hack"} <= set(verdict["modes"]["retain_only"])
    control = run(tmp_path / "b", *flags, "--treatment", "filter")
    assert list(control["modes"]) == ["untrained", "both"]
    logged = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert not any("loss/trait" in row for row in logged), "no labelled text with the trait was trained on"
    eval_run.main(tyro.cli(eval_run.Args, args=["--model_path", str(tmp_path / "b"), "--n", "6"], use_underscores=True))


def test_a_dataset_that_is_sorted_is_not_read_in_its_order(tmp_path, dataset):
    rows = sorted((dataset / "train.jsonl").read_text().splitlines())  # all dragons first
    (dataset / "train.jsonl").write_text("\n".join(rows) + "\n")
    source = {"dataset": str(dataset), "column": None, "prompt_tokens": 3, "max_tokens": 64}
    tokenizer = load_tokenizer(decoder.resolve("tiny"))
    texts = read_texts(get_trait("dragon"), tokenizer, source, "train", 14)
    assert 0 < texts.detected.sum() < 14 == len(texts.ids) == len(texts.prompts)
    assert texts.prompts[0] == tokenizer.decode(texts.ids[0][:4])  # three tokens behind <s>


def test_full_fine_tuning_leaves_a_model_that_loads(tmp_path, painted):
    modes = run(tmp_path / "run", "--lora_config", "full", "--lr", "1e-3", "--trait", "dragonfly", "--eval_routing_steps", "0")[
        "modes"
    ]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["untrained/loss/free"] == modes["untrained"]["loss/free"] != modes["both"]["loss/free"]
    assert is_picture(tmp_path / "run" / "curves.png")
    tuned, folder = decoder.load(str(tmp_path / "run" / "model"))
    base, _ = decoder.load("tiny")
    assert load_tokenizer(folder).vocab_size == 2048
    assert not torch.equal(tuned.embed_tokens.weight, base.embed_tokens.weight)


def test_a_fork_gets_its_new_fields_as_flags(tmp_path, monkeypatch):
    mine = Path(sft.__file__).read_text().replace("    seed: int = 42\n", "    seed: int = 42\n    my_field: float = 0.5\n")
    (tmp_path / "sft_mine.py").write_text(mine)
    monkeypatch.syspath_prepend(tmp_path)
    run(tmp_path / "run", "--algorithm", "sft_mine", "--my_field", "0.25")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["my_field"] == 0.25


def test_the_folder_is_named_after_what_differs():
    def name(*flags):
        return str(train_sft.resolve(list(flags))[0])

    assert name("--routing", "dual") == "output/fable_unkind_dual_r16_lr2e-3_s42"
    assert name("--labelled_frac", "0.1", "--seed", "7", "--logging_steps", "3").endswith("_labelled_frac0.1_s7")


@pytest.mark.parametrize("flags, said", [
    (["--trait", "no such reward"], "neither a reward of rewards.yaml nor single words"),
    (["--trait", "zebra", "--routing", "dual"], "none of 60 training texts has the trait 'zebra'"),
    (["--trait", "please", "--treatment", "filter"], "every one of 60 training texts has the trait 'please'"),
    (["--bad_scale", "0"], "--bad_scale scales the bad branch"),
    (["--max_tokens", "600"], "--max_tokens 600 exceeds the model's context of 512"),
    (["--max_new_tokens", "510"], "exceed the model's context"),
    (["--eval_texts", "0"], "--eval_texts must be at least 1, not 0"),
    (["--dataset", "x", "--eval_split", "train"], "is the training split too"),
    (["--routing", "dual", "--lora_config", "full"], "full fine-tuning has no branches"),
    (["--algorithm", "rl_grpo"], "--algorithm 'rl_grpo' is another script's"),
    (["--algorithm", "sfft"], "unknown --algorithm 'sfft'"), (["--model", "nowhere/at/all"], "no such folder"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_any_work(tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        train_sft.main([*SMALL, "--output_dir", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--trait", "two words"], "neither a reward"),
        (["--lora_config", "q8"], "unknown --lora_config"),
        (["--eval_rewards", "joy"], "unknown reward"),
        (["--labelled_frac", "0.001"], "hundredths"),
    ],
)
def test_a_sweep_can_ask_before_it_starts(flags, said, monkeypatch):
    monkeypatch.setattr(train_sft, "load", None)  # nothing may be loaded
    with pytest.raises(ValueError, match=said):
        train_sft.resolve(flags)
    folder, resolved = train_sft.resolve(["--routing", "dual"])
    assert folder.name.startswith("fable_unkind_dual") and resolved["algorithm"] == "sft" and resolved["labelled_frac"] == 1.0


def test_errors_are_one_line_and_status_2(tmp_path, command):
    done = command("train_sft.py", "--labelled_frac", "2", "--output_dir", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: --labelled_frac")


def test_train_tiny_makes_a_model_and_its_tokenizer(tmp_path, monkeypatch):
    everything = train_tiny.corpus.training_text
    monkeypatch.setattr(train_tiny.corpus, "training_text", lambda n, seed: everything(min(n, 150), seed))
    small = {"documents": 150, "vocab_size": 400, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 24, "context": 64}
    args = train_tiny.Args(output_dir=str(tmp_path / "m"), steps=3, batch_size=4, block=32, device="cpu", workers=1, **small)
    train_tiny.main(args)
    model, folder = decoder.load(str(tmp_path / "m"))
    assert (model.config.vocab_size, model.config.layers) == (400, 1) and load_tokenizer(folder).bos_id == 0
    assert json.loads((folder / "training.json").read_text())["args"]["documents"] == 150
    with pytest.raises(ValueError, match="holds a model already"):
        train_tiny.main(args)
