"""gpt2-medium and pythia-410m, small and random: folders laid out as on the Hub, the real tokenizers, the LoRA 16/32/.05 that is
usual on them, through the train scripts and back."""
import json

import pytest
import torch
import tyro
import yaml
from safetensors.torch import load_file, save_file

import eval_run
import train_grpo
import train_ppo
from adapters import AdapterSpec, Branch, LoRALinear, adapter_tensors, scaled
from model import Decoder, config_from_hf, hf_name, is_conv1d
from verdict import load_run

CONFIGS = {  # those of the Hub, their sizes apart
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
        "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 128, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 128, "n_special": 0, "resid_pdrop": 0.1,
        "predict_special_tokens": True, "summary_activation": None, "summary_first_dropout": 0.1, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "pythia": {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 16,
        "initializer_range": 0.02, "intermediate_size": 64, "layer_norm_eps": 1e-05, "max_position_embeddings": 128,
        "model_type": "gpt_neox", "num_attention_heads": 2, "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "use_parallel_residual": True,
        "vocab_size": 50304,
    },
}  # fmt: skip
TARGETS = {"gpt2": "c_attn,c_proj", "pythia": "query_key_value"}
ADAPTED = {"gpt2": ["self_attn.c_attn", "self_attn.c_proj", "mlp.c_proj"], "pythia": ["self_attn.query_key_value"]}


@pytest.fixture(scope="module", params=CONFIGS)
def hub(request, tmp_path_factory, data_dir):
    """(name, folder): config.json, weights under the names and in the dtype of the Hub's file, buffers included, tokenizer."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model, state = Decoder(config_from_hf(CONFIGS[name])), {}
    for ours, tensor in model.state_dict().items():
        tensor = 3 * tensor if tensor.dim() == 2 else tensor + 0.1 * torch.randn_like(tensor)
        theirs = hf_name(ours, model.config.family).removeprefix("transformer.")
        state[theirs] = (tensor.t() if is_conv1d(ours, model.config) else tensor).contiguous()
    for i in range(2):
        if name == "gpt2":
            state[f"h.{i}.attn.bias"] = torch.ones(128, 128).tril().view(1, 1, 128, 128)
        else:
            prefix = f"gpt_neox.layers.{i}.attention."
            state |= {prefix + "bias": torch.ones(1, 1, 128, 128).tril(), prefix + "masked_bias": torch.tensor(-1e9)}
            state[prefix + "rotary_emb.inv_freq"] = torch.ones(1)
    dtype = torch.float16 if name == "pythia" else torch.float32
    save_file({key: t.to(dtype) for key, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    for file in (data_dir / "tokenizers" / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "texts").mkdir()
    for split in ("train", "test"):
        lines = [f"A {split} text, number {i}: the cat was happy in the {i}th house of a long street." for i in range(6)]
        (folder / "texts" / f"{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return name, folder


def flags_of(hub, script: str, run) -> list[str]:
    (name, folder), (_, own) = hub, SCRIPTS[script]
    paths = {"model": folder, "dataset": folder / "texts", "output_dir": run, "lora_targets": TARGETS[name]}
    paths |= {"base_text": folder / "texts"} if script == "ppo" else {}
    return [*SMALL, *own, *(word for key, value in paths.items() for word in (f"--{key}", str(value)))]


SMALL = ["--max_steps", "2", "--batch_size", "4", "--max_new_tokens", "6", "--min_new_tokens", "2", "--top_p", "0.9",
         "--eval_prompts", "4", "--logging_steps", "1", "--save_steps", "1", "--lr", "1e-2", "--device", "cpu",
         "--lora_config", "r8", "--lora_alpha", "32", "--lora_dropout", "0.05"]  # fmt: skip
SCRIPTS = {
    "grpo": (train_grpo, ["--num_generations", "2", "--routing", "dual", "--bad_scale", "0", "--eval_routing_steps", "0",
                          "--false_positive_frac", "0.5"]),
    "ppo": (train_ppo, ["--env", "stories", "--reward", train_grpo.Args().reward, "--ssl_steps", "1", "--ssl_texts", "4",
                        "--ssl_batch_size", "2", "--max_tokens", "16", "--eval_texts", "4", "--prompt_tokens", "8",
                        "--num_minibatches", "2", "--num_epochs", "1", "--eval_every", "0"]),
}  # fmt: skip
BRANCHES = {"grpo": (Branch("good", 8, 16.0), Branch("bad", 8, 16.0)), "ppo": (Branch("adapter", 16, 32.0),)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_trains_saves_and_loads_with_the_usual_lora(hub, script, tmp_path):
    (name, model_folder), run = hub, tmp_path / "run"
    assert SCRIPTS[script][0].main(flags_of(hub, script, run)) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    asked = {"lora_config": "r8", "lora_alpha": 32.0, "lora_dropout": 0.05, "lora_targets": TARGETS[name]}
    assert {key: config[key] for key in asked} == asked
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["logprob_gap"] < 1e-4 for row in logged if "logprob_gap" in row)

    argv = ["--model_path", str(run), "--n", "4", "--device", "cpu"]
    eval_run.main(tyro.cli(eval_run.Args, args=argv, use_underscores=True))
    verdict, again = (json.loads(file.read_text())["modes"] for file in (run / "verdict.json", run / "eval" / "eval.json"))
    assert all(again[mode][key] == value for mode, row in verdict.items() for key, value in row.items())

    trained = load_file(run / "adapter.safetensors")
    for checkpoint in (None, run / "checkpoint-2"):
        _, model, tokenizer, *_ = load_run(run, 4, checkpoint=checkpoint)
        assert model.adapter.spec == AdapterSpec("lora", BRANCHES[script], tuple(TARGETS[name].split(",")), 1, 0.05)
        found = adapter_tensors(model)
        assert found.keys() == trained.keys() and all(torch.equal(found[key], trained[key]) for key in found)
    paths = [path for path, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert paths == [f"layers.{i}.{path}" for i in range(2) for path in ADAPTED[name]]
    assert len(trained) == 2 * len(BRANCHES[script]) * len(paths) and all(bool(t.any()) for t in trained.values())

    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a cat.")])
    for branch in model.adapter.names:
        said = json.loads((run / "peft" / branch / "adapter_config.json").read_text())
        assert said["lora_dropout"] == 0.05 and said["lora_alpha"] / said["r"] == 2
        assert {target.split(".")[-1] for target in said["target_modules"]} == set(TARGETS[name].split(","))
        base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        peer = peft.PeftModel.from_pretrained(base, run / "peft" / branch).eval()
        with torch.no_grad(), scaled(model, **{other: float(other == branch) for other in model.adapter.names}):
            mine, theirs = model(ids), peer(ids).logits
        with torch.no_grad(), peer.disable_adapter():
            moved = (peer(ids).logits - theirs).abs().max()
        assert (mine - theirs).abs().max() < 1e-5 < 1e-4 < moved, branch


@pytest.mark.parametrize("flags, message", [
    (["--lora_targets", "q_proj"], "unknown adapter target 'q_proj'; a gpt"),
    (["--lora_config", "m4", "--lora_alpha", "0", "--lora_dropout", "0", "--lora_targets", "c_fc"], "--lora_targets is of"),
    (["--lora_dropout", "1"], "--lora_dropout in 0..1, below 1")])  # fmt: skip
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_an_adapter_does_not_take_is_refused_before_there_is_a_folder(hub, script, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SCRIPTS[script][0].main([*flags_of(hub, script, tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()
