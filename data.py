"""Tokenizers and datasets: text in, ids out, and back without losing a space.

    tokenizer = load_tokenizer(folder)                           # a Hugging Face folder (model.resolve finds it)
    texts = load_texts("roneneldan/TinyStories", "train", limit=1000)     # a Hub id or a local folder
    prompts = opening_prompts(texts, tokenizer, prompt_tokens=8, limit=256)
    ids, mask = left_pad(prompts.ids, tokenizer.pad_id)          # (B, P) int64, (B, P) bool
    tokenizer.decode_completion(prompt_ids, completion_ids)      # reads on from the prompt, leading space and all

How it departs from transformers' tokenizers: nothing is ever added to a text (SimpleStories' own post-processor would append
[EOS], and the model would then write after the end of a story); a BOS goes before a prompt only where the model was trained with
one; there is no attention mask made from ids, because masks are carried from where the padding was done.
"""

import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

BOS_SPELLINGS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>")
EOS_SPELLINGS = ("<|endoftext|>", "</s>", "[EOS]", "<eos>", "<|end_of_text|>", "<|im_end|>")
PAD_SPELLINGS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
TEXT_COLUMNS = ("story", "text", "prompt")
BROKEN = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


# ---------------------------------------------------------------- tokenizers

class Tokenizer:
    """A tokenizers.Tokenizer and what is known of its special tokens.

    Attributes:
        vocab_size: highest id + 1. The model's embedding may be larger (Pythia: 50277 and 50304), never smaller.
        eos_id: ends a text; `eos_ids` where a model has several.
        bos_id: goes before a prompt; None where the model was trained without one.
        stop_ids: ids at which sampling ends: EOS and, where there is one, BOS, since a BOS inside a text starts the next text
            (llama2.c's models were trained on texts joined by BOS alone).
        pad_id: fills rows. Its own token where the vocabulary has one, else EOS: safe here, because masks are carried and never
            inferred from ids.
        lower_case: the vocabulary has no capitals (SimpleStories): texts are lower-cased before they are encoded.
        backend: the tokenizers.Tokenizer.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: tuple[int, ...], bos_id: int | None):
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = _special_ids(backend)
        self.backend = backend
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_ids, self.eos_id, self.bos_id = eos_ids, eos_ids[0], bos_id
        self.stop_ids = eos_ids if bos_id is None else (*eos_ids, bos_id)
        self.pad_id = next((vocabulary[token] for token in PAD_SPELLINGS if token in vocabulary), self.eos_id)
        self.lower_case = type(backend.model).__name__ == "WordPiece" and not any(
            token != token.lower() for token, i in vocabulary.items() if i not in special)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added. A special token spelled out in the text (<|im_start|>) becomes that token."""
        return self.backend.encode(text.lower() if self.lower_case else text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt: BOS, where the model was trained with one, and the text. Never an EOS."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def encode_text(self, text: str, max_tokens: int | None = None) -> list[int]:
        """The ids of a whole text as a model reads it: `encode_prompt`, and EOS, cut to max_tokens."""
        return [*self.encode_prompt(text), self.eos_id][:max_tokens]

    def decode(self, ids) -> str:
        """The text of a whole sequence (list or 1-D tensor) without its special tokens; a cut character reads as U+FFFD."""
        return self.backend.decode(_as_list(ids), skip_special_tokens=True)

    def decode_batch(self, sequences) -> list[str]:
        # a loop, not the backend's own batch: that starts threads, and what forks later (the grader) would warn or hang
        return [self.decode(ids) for ids in sequences]

    def decode_prompt(self, ids) -> str:
        """The text of a prompt whose cut may go through a character: that character belongs to what follows."""
        return self.decode(ids).rstrip(BROKEN)

    def decode_completion(self, prompt_ids, completion_ids) -> str:
        """The text that a completion adds to its prompt: decode_prompt(p) + decode_completion(p, c) == decode(p + c).

        Decoded alone, a completion would lose the space it begins with (SentencePiece, WordPiece) or the "##" that joins it to
        the prompt's last word, and halves of a character on both sides of the cut would never meet. One exception to the
        equation: a byte-fallback decoder calls a whole run of bytes broken when one is, so a completion that breaks a character
        right after a prompt that ended in byte tokens starts where the two texts part.
        """
        before, whole = self.decode_prompt(prompt_ids), self.decode(_as_list(prompt_ids) + _as_list(completion_ids))
        if whole.startswith(before):
            return whole[len(before):]
        return whole[len(os.path.commonprefix([before, whole])):]

    def decode_completions(self, prompts, completions) -> list[str]:
        """`decode_completion` of each pair: prompts and completions of equal number, prompts repeated per completion."""
        return [self.decode_completion(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _as_list(ids) -> list[int]:
    return ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else list(ids)


def _special_ids(backend: tokenizers.Tokenizer) -> set[int]:
    return {i for i, token in backend.get_added_tokens_decoder().items() if token.special}


def _read_backend(folder: Path, model_type: str | None) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.no_truncation()  # some published files carry the settings of the training run that made them
        backend.no_padding()
        return backend
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        if model_type not in (None, "gpt2"):
            raise ValueError(f"{folder} has vocab.json and merges.txt but no tokenizer.json, "
                             f"and its model_type is {model_type!r}: "
                             "only GPT-2's way of splitting words is known without that file. Add the model's tokenizer.json")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([token for token in EOS_SPELLINGS if backend.token_to_id(token) is not None])
        return backend
    raise ValueError(f"{folder} holds no tokenizer: tokenizer.json is needed, or vocab.json with merges.txt (GPT-2)" +
                     ("" if folder.is_dir() else "; there is no such folder"))


def _find_eos(backend: tokenizers.Tokenizer, config: dict, folder: Path) -> tuple[int, ...]:
    spelled = [backend.token_to_id(token) for token in EOS_SPELLINGS if backend.token_to_id(token) is not None]
    named = config.get("eos_token_id")
    named = [] if named is None else list(named) if isinstance(named, (list, tuple)) else [named]
    real = tuple(i for i in named if i in _special_ids(backend) or i in spelled)
    if real:
        return real
    if not spelled:
        raise ValueError(f"{folder}: no end-of-text token. config.json names {named or 'none'}, and the vocabulary has none of "
                         f"{', '.join(EOS_SPELLINGS)}. Set eos_token_id to the id of a special token of this tokenizer")
    if named:  # SimpleStories' config carries LLaMA's default of 2, which there is a piece of a word
        warnings.warn(f"{folder}: config.json names eos_token_id {named}, which is the ordinary token "
                      f"{backend.id_to_token(named[0])!r}; "
                      f"{backend.id_to_token(spelled[0])!r} (id {spelled[0]}) ends texts instead",
                      stacklevel=3)
    return (spelled[0],)


def load_tokenizer(folder, model_config: dict | None = None) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder: tokenizer.json, or vocab.json and merges.txt (GPT-2).

    Args:
        folder: the folder.
        model_config: the content of config.json, for eos_token_id, bos_token_id and model_type;
            read from `folder` where not given. Without either, EOS is found by its spelling and there is no BOS.
    Raises:
        ValueError: no tokenizer there, or none of its tokens ends a text.
    Warns:
        config.json names as EOS a token that is an ordinary piece of text; the one spelled as EOS is taken.
    """
    folder = Path(folder)
    if model_config is None:
        file = folder / "config.json"
        model_config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    backend = _read_backend(folder, model_config.get("model_type"))
    eos_ids = _find_eos(backend, model_config, folder)
    # GPT-2, Pythia and Qwen name their EOS, or no trained token at all, as BOS: spelling decides
    bos_id = model_config.get("bos_token_id")
    if not isinstance(bos_id, int) or bos_id in eos_ids or backend.id_to_token(bos_id) not in BOS_SPELLINGS:
        bos_id = None
    return Tokenizer(backend, eos_ids, bos_id)


def check_tokenizer_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """ValueError where an id of the tokenizer would fall outside an embedding of `vocab_size` rows."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's embedding {vocab_size} rows: "
                         "they do not belong together. Load the tokenizer from the model's own folder")


# ---------------------------------------------------------------- datasets

def load_rows(dataset: str, split: str, columns=None, limit: int | None = None, shuffle_seed: int | None = None) -> list[dict]:
    """Rows of a dataset as dicts.

    Args:
        dataset: a local folder laid out as on the Hub (train.jsonl.gz, ...), or a Hub id, with a configuration as "id:name".
        split: a split's name, or a slice of one ("train[:500]").
        columns: the columns wanted, all where None.
        limit: that many rows at most, after shuffling.
        shuffle_seed: draw the order from this seed; None keeps the dataset's own order. Shuffle IMDB: it is sorted by label.
    Raises:
        ValueError: names what is unknown (dataset, split, column) and lists what there is.
    """
    import datasets  # nearly two seconds, and only some scripts read a dataset

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: ask for at least 1 row, or None for all")
    builder = _builder(str(dataset))
    splits = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
    if split.split("[")[0] not in splits:
        raise ValueError(f"dataset {dataset!r} has no split {split!r}: it has {', '.join(splits)}")
    try:
        builder.download_and_prepare()  # into the cache of datasets, never into the folder itself
        table = builder.as_dataset(split=split)
    except Exception as error:
        raise ValueError(f"dataset {dataset!r}, split {split!r} can't be read: {error.__cause__ or error}") from error
    if len(table) == 0:
        raise ValueError(f"dataset {dataset!r}, split {split!r} has no rows")
    for column in columns or ():
        if column not in table.column_names:
            raise ValueError(f"dataset {dataset!r} has no column {column!r}: it has {', '.join(table.column_names)}")
    order = np.arange(len(table)) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(len(table))
    return table.select_columns(list(columns or table.column_names)).select(order[:limit]).to_list()


def _builder(dataset: str):
    """The dataset's builder; any way in which it can't be reached is one ValueError."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    huggingface_hub.logging.set_verbosity_error()
    folder = Path(dataset).expanduser()
    name, _, configuration = dataset.partition(":")
    if folder.is_dir():
        name, configuration = str(folder), ""
    elif folder.exists():
        raise ValueError(f"dataset {dataset!r} is a file: "
                         "give the folder that holds its splits (train.jsonl, test.jsonl.gz, ...)")
    elif dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1:
        raise ValueError(f"dataset {dataset!r}: no such folder (looked in {folder.absolute()})")
    elif not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists():
        try:  # one question first: load_dataset retries for half a minute before it says that the network is down
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise ValueError(f"dataset {dataset!r} is neither a local folder nor on the Hugging Face Hub") from error
        except Exception as error:
            raise ValueError(f"dataset {dataset!r} is no local folder, it is not in the cache, and the Hugging Face Hub can't be "
                             f"reached ({type(error).__name__}: {error}). Give a local folder, or a network") from error
    try:
        return datasets.load_dataset_builder(name, configuration or None)
    except Exception as error:
        raise ValueError(f"dataset {dataset!r} can't be opened: {type(error).__name__}: {error}") from error


def load_texts(dataset: str, split: str, column: str | None = None, limit: int | None = None,
               shuffle_seed: int | None = None) -> list[str]:
    """One text column of a dataset; see `load_rows`. `column` None takes the first of story, text, prompt that exists."""
    if column is None:
        names = list(load_rows(dataset, split, limit=1)[0])
        column = next((name for name in TEXT_COLUMNS if name in names), None)
        if column is None:
            raise ValueError(f"dataset {dataset!r} has none of the columns {', '.join(TEXT_COLUMNS)}: "
                             f"name one of {', '.join(names)}")
    texts = [row[column] for row in load_rows(dataset, split, [column], limit, shuffle_seed)]
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"column {column!r} of dataset {dataset!r} is no text: row {wrong} holds {texts[wrong]!r}. "
                         "Name another column")
    return texts


# ---------------------------------------------------------------- prompts

class Prompts(NamedTuple):
    ids: list[list[int]]  # BOS included where the model has one
    texts: list[str]  # what each says: decode_prompt of its ids
    dropped: int  # empty texts that were left out


def opening_prompts(texts, tokenizer: Tokenizer, prompt_tokens: int, limit: int | None = None,
                    max_context: int | None = None) -> Prompts:
    """The first `prompt_tokens` tokens of each text as a prompt, the whole text where it is shorter.

    Args:
        texts: strings; an empty or blank one is dropped and counted, duplicates are kept.
        prompt_tokens: tokens of text; a BOS comes on top.
        limit: stop after that many prompts; fewer come back where there are fewer texts.
        max_context: the longest prompt allowed, BOS included: the model's context minus the tokens to be sampled.
    Raises:
        ValueError: a prompt longer than max_context, or no prompt at all.
    """
    if prompt_tokens < 1 or (limit is not None and limit < 1):
        raise ValueError(f"prompt_tokens is {prompt_tokens} and limit {limit}: both count from 1")
    ids, dropped = [], 0
    for i, text in enumerate(texts):
        if len(ids) == limit:
            break
        opening = tokenizer.encode(text)[:prompt_tokens] if text.strip() else []
        if not opening:
            dropped += 1
            continue
        prompt = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + opening
        if max_context is not None and len(prompt) > max_context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, {max_context} fit beside the completion: lower prompt_tokens "
                             f"({prompt_tokens}) or max_new_tokens")
        ids.append(prompt)
    if not ids:
        raise ValueError(f"no prompts: all {dropped} texts are empty")
    return Prompts(ids, [tokenizer.decode_prompt(prompt) for prompt in ids], dropped)


def left_pad(sequences, pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids, each filled up on its left -> ids (B, P) int64, mask (B, P) bool, True on real tokens.

    Raises ValueError for an empty row: with nothing to attend to, its logits are undefined.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        found = f"and sequence {lengths.index(0)} is empty: drop it, or put BOS in it" if lengths else "got none"
        raise ValueError(f"left_pad needs at least one sequence, {found}")
    ids = torch.full((len(lengths), max(lengths)), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (sequence, length) in enumerate(zip(sequences, lengths)):
        ids[row, -length:] = torch.as_tensor(sequence, dtype=torch.long)
        mask[row, -length:] = True
    return ids, mask


def right_pad(sequences, pad_id: int) -> tuple[Tensor, Tensor]:
    """`left_pad` with the filling behind the tokens."""
    ids, mask = left_pad([list(sequence)[::-1] for sequence in sequences], pad_id)
    return ids.flip(1), mask.flip(1)
