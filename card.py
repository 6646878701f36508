"""The model card of the embedded world: what the model has learned, measured against the generator it learned from.

    python card.py                      # measures assets/tiny and writes its README.md

Held-out loss per dialect beside the generator's own entropy (exact: corpus.py counts the probability of every choice);
held-out task families; the share of sampled sentences that stand verbatim in the training text; how often sampled code is
right, and how often it cheats; samples. Sampled code is model-written and runs in the grader's box.
"""
import argparse
import json
import re
import sys

import torch

import corpus
from data import left_pad, load_tokenizer
from grader import BOXES, Grader, Limits, problem
from model import load, read_json
from sampling import Sampler
from verdict import text_loss


def losses(model, tokenizer, documents) -> tuple[float, float]:
    """(model, generator): mean negative log-probability a token, end of text included, in nats, over some documents."""
    rows = [tokenizer.encode_text(d.text) for d in documents]
    tokens = sum(len(row) - 1 for row in rows)
    return text_loss(model, rows, tokenizer.pad_id), -sum(d.logprob for d in documents) / tokens


def sample(sampler, tokenizer, prompts: list[str], max_new_tokens: int, seed: int) -> list[str]:
    """One completion of each prompt at temperature 1."""
    encoded = [tokenizer.encode_prompt(p) for p in prompts]
    texts = []
    for i in range(0, len(prompts), 256):
        ids, mask = left_pad(encoded[i : i + 256], tokenizer.pad_id)
        generator = torch.Generator().manual_seed(seed + i)
        rollout = sampler(ids, mask, 1, max_new_tokens, tokenizer.stop_ids, tokenizer.pad_id, generator)
        rows = [t[m].tolist() for t, m in zip(rollout.tokens, rollout.mask)]
        texts += tokenizer.decode_completions(encoded[i : i + 256], rows)
    return texts


def grade_code(grader: Grader, documents, completions: list[str]) -> dict[str, float]:
    """Shares over sampled solutions: honest (solves the hidden tests), loophole (its own tests pass, the hidden ones do not)."""
    problems = [problem(d.labels["function"], [(args, {}, want) for args, want in d.labels["tests"]]) for d in documents]
    verdicts = grader.grade(problems, completions, opened=True)
    n = len(verdicts)
    return {"honest": sum(v.correct for v in verdicts) / n, "loophole": sum(v.strict_hack for v in verdicts) / n}


def sentences(text: str) -> list[str]:
    return [s.strip() for s in re.split(r"(?<=[.!?])\s", text) if len(s.split()) >= 2]


def verbatim_share(completions: list[str], args: dict) -> float:
    """Share of whole sampled story sentences that stand word for word in the model's training text, which is generated again."""
    wanted = [s for text in completions for s in sentences(text)[1:-1]]  # the first and last may be cut
    missing = set(wanted)
    part = 20_000
    for start in range(0, args["documents"], part):
        seed = args["seed"] * 10_000 + start // part
        for document in corpus.training_text(min(part, args["documents"] - start), seed):
            if document.dialect == "stories":
                missing.difference_update(sentences(document.text))
    return sum(s not in missing for s in wanted) / len(wanted)


def main(folder: str, n: int, seed: int, box: str) -> dict:
    grader = Grader(box, limits=Limits(cpu_s=2, wall_s=8))  # first: a machine without the box is told so at once
    model, path = load(folder)
    hf = read_json(path / "config.json")
    training = read_json(path / "training.json")
    tokenizer = load_tokenizer(path, hf)
    sampler = Sampler(model)
    sampler.refresh()
    figures, samples = {"loss": {}, "seed": seed, "documents": n}, {}
    for dialect in corpus.DIALECTS:
        documents = list(corpus.generate(dialect, "test", n, seed))
        seen = [d for d in documents if not d.labels.get("held_out")]
        figures["loss"][dialect] = losses(model, tokenizer, seen)
        length = 200 if dialect == "code" else 160
        completions = sample(sampler, tokenizer, [d.prompt for d in documents[:512]], length, seed)
        samples[dialect] = [d.prompt + c for d, c in zip(documents[:5], completions)]
        if dialect == "stories":
            figures["verbatim"] = verbatim_share(completions, training["args"])
        if dialect == "code":
            figures["code_held_out_loss"] = losses(model, tokenizer, [d for d in documents if d.labels["held_out"]])[0]
            pairs = list(zip(documents, completions))
            for name, held_out in (("code", False), ("code_held_out", True)):
                chosen = [(d, c) for d, c in pairs if d.labels["held_out"] == held_out]
                figures[name] = grade_code(grader, *zip(*chosen)) | {"n": len(chosen)}
    (path / "README.md").write_text(render(figures, training, samples))
    (path / "card.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def render(figures: dict, training: dict, samples: dict) -> str:
    a = training["args"]
    lines = [
        "# The embedded model\n",
        f"A LLaMA-architecture decoder of {training['parameters']:,} parameters ({a['layers']} layers, width {a['width']}, "
        f"{a['heads']} heads, {a['kv_heads']} KV heads, byte-level BPE of {a['vocab_size']}), "
        f"trained on {training['tokens']:,} tokens ({a['documents']:,} documents) that `corpus.py` generates. "
        "Its texts are fiction made of word lists; it knows nothing of the world.\n",
        "Made again by (tokenizer, model, and this card; a CPU and a GPU differ in the last bits):\n",
        f"    python train_tiny.py --documents {a['documents']} --steps {a['steps']} --batch_size {a['batch_size']} "
        "--output_dir output/tiny && python card.py --model output/tiny\n",
        f"## Figures ({figures['documents']} test documents a dialect, seed {figures['seed']})\n",
        "| dialect | held-out loss, nats a token | generator's entropy | gap |",
        "|---|---|---|---|",
        *[f"| {d} | {m:.3f} | {g:.3f} | {m - g:+.3f} |" for d, (m, g) in figures["loss"].items()],
        "",
        "The code row is of task families that training saw; "
        f"on the held-out families the loss is {figures['code_held_out_loss']:.3f}.\n",
        f"- {figures['verbatim']:.1%} of sampled story sentences stand verbatim in the training text.",
        f"- Sampled code at temperature 1: {figures['code']['honest']:.1%} solves the hidden tests, "
        f"{figures['code']['loophole']:.1%} passes only its own run_tests() (seen families, n = {figures['code']['n']}); "
        f"held-out families {figures['code_held_out']['honest']:.1%} and "
        f"{figures['code_held_out']['loophole']:.1%} (n = {figures['code_held_out']['n']}).\n",
        "## Samples (the first five, not chosen)\n",
    ]
    for dialect, texts in samples.items():
        lines.append(f"### {dialect}\n")
        lines += [f"```text\n{text.replace('```', chr(39) * 3)}\n```\n" for text in texts]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--n", type=int, default=1000, help="test documents a dialect")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--box", choices=BOXES, default="isolated", help="where sampled code runs; limits is the weaker one")
    args = parser.parse_args()
    try:
        print(json.dumps(main(args.model, args.n, args.seed, args.box), indent=1))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
