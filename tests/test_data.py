"""Tokenizers and datasets: known ids, no token added to a prompt, completions that read on, errors that name the thing."""

import gzip
import json
import random
import warnings

import huggingface_hub
import pytest
import tokenizers
import torch

from data import check_tokenizer_fits, left_pad, load_rows, load_texts, load_tokenizer, opening_prompts

FOLDERS = {"gpt2": "tokenizers/gpt2", "pythia": "tokenizers/pythia", "qwen3": "tokenizers/qwen3",
           "simplestories": "tokenizers/simplestories",
           "stories3M": "models/stories3M", "stories260K": "models/stories260K"}
LOADED = {}


@pytest.fixture(params=FOLDERS)
def tokenizer(request, data_dir):
    return load(request.param, data_dir)


def load(name, data_dir):
    if name not in LOADED:
        LOADED[name] = load_tokenizer(data_dir / FOLDERS[name])
    return LOADED[name]


# ---------------------------------------------------------------- real tokenizers

@pytest.mark.parametrize("name, ids", [("gpt2", [15496, 995]), ("pythia", [12092, 1533]), ("qwen3", [9707, 1879])])
def test_hello_world(name, ids, data_dir):
    tokenizer = load(name, data_dir)
    assert tokenizer.encode("Hello world") == tokenizer.encode_prompt("Hello world") == ids  # none of these has a BOS
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == "Hello world"


@pytest.mark.parametrize("name, vocab_size, bos, eos, stops, pad, lower", [
    ("gpt2", 50257, None, 50256, (50256,), 50256, False), ("pythia", 50277, None, 0, (0,), 1, False),
    ("qwen3", 151669, None, 151643, (151643,), 151643, False), ("simplestories", 4096, None, 1, (1,), 1, True),
    ("stories3M", 4096, 1, 2, (2, 1), 2, False), ("stories260K", 512, 1, 2, (2, 1), 2, False)])
def test_special_tokens(name, vocab_size, bos, eos, stops, pad, lower, data_dir):
    t = load(name, data_dir)
    assert (t.vocab_size, t.bos_id, t.eos_id, t.stop_ids, t.pad_id, t.lower_case) == (vocab_size, bos, eos, stops, pad, lower)


def test_simplestories_prompt_has_no_eos_and_is_lower_case(data_dir):
    tokenizer = load("simplestories", data_dir)
    appended = tokenizer.backend.encode("hello world").ids
    assert appended[-1] == 1  # what the published post-processor does
    assert tokenizer.encode_prompt("HELLO World") == appended[:-1]
    assert tokenizer.decode(appended) == "hello world"


def test_stories_prompt_has_its_bos(data_dir):
    tokenizer = load("stories3M", data_dir)
    assert tokenizer.encode_prompt("Once upon a time")[0] == 1 and 1 not in tokenizer.encode("Once upon a time")
    assert tokenizer.decode(tokenizer.encode_prompt("Once upon a time")) == "Once upon a time"


def test_ids_equal_transformers(tokenizer, data_dir):
    transformers = pytest.importorskip("transformers")
    name = next(key for key, value in LOADED.items() if value is tokenizer)
    folder = data_dir / FOLDERS[name]
    if name == "gpt2":
        peer = transformers.GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    else:
        peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in ("Once there was 1 dog, who'd run.\n\n  The end", "naïve 漢字 😀", "def f(x):\n    return x"):
        text = text.lower() if tokenizer.lower_case else text
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False)


def test_every_cut_of_a_text_decodes_and_joins(tokenizer):
    text = "Once, a girl named Élise said: don't stop walking!\n\n  \"Next\" 12 naïve 漢字 😀 end"
    ids = tokenizer.encode_prompt(text)
    if not tokenizer.lower_case:
        assert tokenizer.decode(ids) == text
    for cut in range(len(ids) + 1):
        for end in range(cut, len(ids) + 1):
            before, added = tokenizer.decode_prompt(ids[:cut]), tokenizer.decode_completion(ids[:cut], ids[cut:end])
            whole = tokenizer.decode(ids[:end])
            assert whole.endswith(added)
            if not whole.endswith("\ufffd"):  # a text that stops within a character: byte fallback breaks its whole run
                assert before + added == whole


def test_a_completion_keeps_its_leading_space(tokenizer):
    ids = tokenizer.encode_prompt("the dog ran home")
    cut = len(tokenizer.encode_prompt("the dog"))
    assert tokenizer.decode_completion(ids[:cut], ids[cut:]) == " ran home"
    assert tokenizer.decode_completions([ids[:cut]] * 2, [ids[cut:], ids[cut:] + [tokenizer.eos_id]]) == [" ran home"] * 2
    assert tokenizer.decode_batch([ids, ids[:cut]]) == ["the dog ran home", "the dog"]


def test_wordpiece_continuation_joins_the_word(data_dir):
    tokenizer = load("simplestories", data_dir)
    piece = tokenizer.backend.token_to_id("##ing")
    assert tokenizer.decode_completion(tokenizer.encode("walk"), [piece]) == "ing"


def test_random_ids_never_crash(tokenizer):
    generator = random.Random(0)
    for _ in range(500):
        prompt, completion = (
            [generator.randrange(tokenizer.vocab_size + 20) for _ in range(generator.randrange(6))] for _ in "ab"
        )
        assert tokenizer.decode(prompt + completion).endswith(tokenizer.decode_completion(prompt, completion))


def test_tokenizer_must_fit_the_embedding(data_dir):
    tokenizer = load("pythia", data_dir)
    check_tokenizer_fits(tokenizer, 50304)
    check_tokenizer_fits(tokenizer, 50277)
    with pytest.raises(ValueError, match="ids up to 50276, the model's embedding 50276 rows"):
        check_tokenizer_fits(tokenizer, 50276)


# ---------------------------------------------------------------- made-up tokenizers: no data needed

def make(folder, special, config=None, words=("one", "two", "three")):
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_settings_left_in_the_file_do_not_act(tmp_path):
    tokenizer = load_tokenizer(make(tmp_path, ["<unk>", "</s>"]))
    assert tokenizer.encode("one two three one") == [2, 3, 4, 2]


def test_eos_list_bos_and_pad(tmp_path):
    special = ["<unk>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<pad>"]
    tokenizer = load_tokenizer(make(tmp_path, special, {"eos_token_id": [3, 2], "bos_token_id": 1}))
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.stop_ids) == (3, (3, 2), (3, 2, 1))
    assert (tokenizer.bos_id, tokenizer.pad_id) == (1, 4)
    given = load_tokenizer(tmp_path, {"eos_token_id": 2, "bos_token_id": 2})  # the config given wins; BOS that is EOS is none
    assert (given.eos_id, given.bos_id, given.stop_ids) == (2, None, (2,))
    assert load_tokenizer(tmp_path, {"eos_token_id": 2, "bos_token_id": 3}).bos_id is None  # not spelled like a BOS
    assert load_tokenizer(tmp_path, {"eos_token_id": 2, "bos_token_id": 999}).bos_id is None


def test_config_that_names_an_ordinary_token_as_eos_warns(tmp_path):
    folder = make(tmp_path, ["[UNK]", "[EOS]"], {"eos_token_id": 2, "bos_token_id": 1})  # SimpleStories, with LLaMA's defaults
    with pytest.warns(UserWarning, match=r"eos_token_id \[2\], which is the ordinary token 'one'; '\[EOS\]' \(id 1\)"):
        tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (1, None)


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer: tokenizer.json is needed"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no end-of-text token.*names none"):
        load_tokenizer(make(tmp_path, ["<unk>"]))
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe/vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (tmp_path / "bpe/merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(tmp_path / "bpe").eos_id == 1
    with pytest.raises(ValueError, match="model_type is 'qwen2'"):
        load_tokenizer(tmp_path / "bpe", {"model_type": "qwen2"})


def test_prompts(tmp_path):
    tokenizer = load_tokenizer(make(tmp_path, ["<unk>", "<s>", "</s>"], {"eos_token_id": 2, "bos_token_id": 1}))
    texts = ["one two three one", "", " \n", "two", "two", "three"]
    prompts = opening_prompts(texts, tokenizer, prompt_tokens=2)
    assert prompts.ids == [[1, 3, 4], [1, 4], [1, 4], [1, 5]]
    assert prompts.texts == ["one two", "two", "two", "three"] and prompts.dropped == 2
    assert opening_prompts(texts, tokenizer, 2, limit=2).ids == [[1, 3, 4], [1, 4]]
    assert opening_prompts(texts, tokenizer, 2, limit=1).dropped == 0
    opening_prompts(texts, tokenizer, 2, max_context=3)
    with pytest.raises(ValueError, match=r"prompt 0 has 3 tokens, 2 fit.*prompt_tokens"):
        opening_prompts(texts, tokenizer, 2, max_context=2)
    with pytest.raises(ValueError, match="all 2 texts are empty"):
        opening_prompts(["", " "], tokenizer, 2)
    with pytest.raises(ValueError, match="prompt_tokens is 0"):
        opening_prompts(texts, tokenizer, 0)


def test_left_pad():
    ids, mask = left_pad([[5, 6, 7], [8], torch.tensor([0, 9])], pad_id=9)  # a real 9 and a real 0 stay real
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8], [9, 0, 9]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]] and mask.dtype == torch.bool
    with pytest.raises(ValueError, match="got none"):
        left_pad([], 0)
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        left_pad([[1], []], 0)


# ---------------------------------------------------------------- datasets

@pytest.fixture
def folder(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2, "other": None if i == 3 else "x"} for i in range(20)]
    for split, part in (("train", rows), ("test", rows[:5])):
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    return tmp_path


def test_local_dataset(folder):
    before = sorted(folder.iterdir())
    assert load_texts(folder, "train") == [f"text {i}" for i in range(20)]
    assert load_texts(str(folder), "test", limit=2) == ["text 0", "text 1"]
    assert load_texts(folder, "train[3:5]", "text", limit=9) == ["text 3", "text 4"]
    assert load_rows(folder, "test", limit=1) == [{"text": "text 0", "label": 0, "other": "x"}]
    assert load_rows(folder, "test", ["label"], limit=2) == [{"label": 0}, {"label": 1}]
    shuffled = load_texts(folder, "train", shuffle_seed=1)
    assert sorted(shuffled) == sorted(load_texts(folder, "train")) and shuffled != load_texts(folder, "train")
    assert load_texts(folder, "train", limit=7, shuffle_seed=1) == shuffled[:7]
    assert load_texts(folder, "train", limit=7, shuffle_seed=2) != shuffled[:7]
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("arguments, message", [
    (("validation",), "no split 'validation': it has train, test"),
    (("train", "storey"), "no column 'storey': it has text, label, other"),
    (("train", "label"), "'label'.*is no text: row 0 holds 0"),
    (("train", "other"), "row 3 holds None"), (("train[", "text"), "can't be read")])
def test_dataset_errors(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_texts(folder, *arguments)


def test_dataset_that_is_not_there(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such folder"):
        load_texts(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="is a file: give the folder"):
        load_texts(folder / "train.jsonl.gz", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="can't be opened"):
        load_texts(tmp_path / "empty", "train")
    with pytest.raises(ValueError, match="limit is 0"):
        load_texts(folder, "train", limit=0)
    with pytest.raises(ValueError, match="neither a local folder nor on the Hugging Face Hub"):
        load_texts("no..such", "train")

    def unreachable(*arguments, **settings):
        raise ConnectionError("the network is down")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(ValueError, match="'some/thing'.*can't be reached.*network is down"):
        load_texts("some/thing", "train")


def test_dataset_without_a_text_column(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    with pytest.raises(ValueError, match="none of the columns story, text, prompt: name one of chosen, rejected"):
        load_texts(tmp_path, "train")
    assert load_texts(tmp_path, "train", "rejected") == ["b"]


@pytest.mark.parametrize("name, split, column, rows", [
    ("tinystories", "test", None, 389), ("simplestories_prompts", "test", None, 1000), ("wikitext2", "test", None, 4359),
    ("hh_harmless", "test", "chosen", 312), ("leetcode", "test", "problem_description", 228)])
def test_real_datasets_read_as_they_stand(name, split, column, rows, data_dir):
    texts = load_texts(data_dir / "datasets" / name, split, column)
    assert len(texts) == rows and any(texts)


def test_real_openings(data_dir):
    tokenizer = load("simplestories", data_dir)
    texts = load_texts(data_dir / "datasets/simplestories_prompts", "test", limit=50)
    prompts = opening_prompts(texts, tokenizer, prompt_tokens=8, max_context=8)
    assert all(0 < len(ids) <= 8 and 1 not in ids for ids in prompts.ids) and len(prompts.ids) == 50
    stories = load("stories3M", data_dir)
    texts = load_texts(data_dir / "datasets/tinystories", "test", limit=50)
    prompts = opening_prompts(texts, stories, prompt_tokens=8)
    assert all(ids[0] == 1 and len(ids) == 9 for ids in prompts.ids)
    assert all(text.startswith(opening) for text, opening in zip(texts, prompts.texts))


def test_loading_is_silent(folder, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_texts(folder, "train", limit=3)
    assert capfd.readouterr() == ("", "")
