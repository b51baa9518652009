"""Train the embedded base model from scratch: tokenizer, weights, chat template.

    python recipes/make_tiny_base.py --out moelora/assets/tiny      # about 15 minutes on 2 cores

A Llama of 1.3 M parameters. It learns plain skills on short lists (copying, picking, spelling
backwards, ordering, counting, small sums), mostly on letters and always under other words than
the built-in tasks use, so that those tasks start low and a small adapter can teach them. All text is
generated here from a seed; on one machine and thread count two runs give the same file.
"""

from __future__ import annotations

import argparse
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
LETTERS, DIGITS = string.ascii_lowercase, string.digits

NAMES = "Ada Ben Cora Dan Eva Finn Gus Hana Ivo Jan Kim Lea Max Nora Oto Pia Ravi Sam Tess Uma".split()
PLACES = "garden kitchen harbour station library market school forest river house tower field".split()
THINGS = "apple book lamp key letter map stone coin basket bell cup drum rope shell wheel kite".split()
ADJECTIVES = "red small old bright heavy quiet green round new soft tall empty warm blue clean".split()
VERBS = "finds carries paints hides sells opens repairs counts keeps lifts washes draws".split()
TIMES = "in the morning|at night|before lunch|every day|on Monday|after school|in winter|once a week".split("|")


def sentence(rng: random.Random) -> str:
    one = f"{rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(THINGS)}"
    two = f"The {rng.choice(ADJECTIVES)} {rng.choice(THINGS)} is in the {rng.choice(PLACES)}"
    return rng.choice([f"{one} {rng.choice(TIMES)}.", f"{two}.", f"{one}. {two}."])


def _join(items: list[str]) -> str:
    return " ".join(items)


SKILLS: dict[str, Callable[[list[str], str], str]] = {
    "say again": lambda x, _: _join(x),
    "say twice": lambda x, _: _join(x + x),
    "say backwards": lambda x, _: _join(x[::-1]),
    "put in order": lambda x, _: _join(sorted(x)),
    "first one": lambda x, _: x[0],
    "last one": lambda x, _: x[-1],
    "without the first": lambda x, _: _join(x[1:]),
    "without the last": lambda x, _: _join(x[:-1]),
    "next of each": lambda x, a: _join([a[(a.index(c) + 1) % len(a)] for c in x]),
    "one before each": lambda x, a: _join([a[a.index(c) - 1] for c in x]),
    "first in order": lambda x, _: min(x),
    "how long": lambda x, _: str(len(x)),
    "with commas": lambda x, _: ", ".join(x),
    "in brackets": lambda x, _: "[" + _join(x) + "]",
    "swap the ends": lambda x, _: _join([x[-1], *x[1:-1], x[0]]),
}
ON_DIGITS = ("say again", "say twice", "first one", "last one", "without the last", "one before each", "swap the ends")


def arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(50), rng.randrange(10)
    return rng.choice(
        [
            (f"{a} + {b} =", str(a + b)),
            (f"{a + b} - {b} =", str(a)),
            (f"is {a} more than {b}?", "yes" if a > b else "no"),
            (f"which is more, {a} or {b}?", str(max(a, b))),
            (f"what comes after {a}?", str(a + 1)),
        ]
    )


def exchange(rng: random.Random) -> tuple[str, str]:
    """One question and its answer."""
    kind = rng.random()
    if kind < 0.15:
        return arithmetic(rng)
    on_digits = kind < 0.4
    skill = rng.choice(ON_DIGITS if on_digits else list(SKILLS))
    alphabet = DIGITS if on_digits else LETTERS
    items = [rng.choice(alphabet) for _ in range(rng.randint(2, 7))]
    return f"{skill}: {_join(items)}", SKILLS[skill](items, alphabet)


def texts(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.1:
            yield sentence(rng) + "<|end|>"
        else:
            question, answer = exchange(rng)
            yield f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>"


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens; digits never merge, so numbers are read digit by digit."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    source = texts(seed + 1)
    corpus = [next(source) for _ in range(20_000)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


class Texts(IterableDataset):
    """Endless token rows. The loss is on answers (questions are random) and on whole sentences."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        answer = self.tokenizer.convert_tokens_to_ids("<|assistant|>")
        for text in texts(self.seed):
            ids = self.tokenizer(text)["input_ids"]
            asked = ids.index(answer) + 1 if answer in ids else 0
            yield {"input_ids": ids, "labels": [-100] * asked + ids[asked:]}


def collate(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    labels = [torch.tensor(row.pop("labels")) for row in rows]
    batch = tokenizer.pad(rows, return_tensors="pt")
    return {**batch, "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = build_tokenizer(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=160,
            intermediate_size=432,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    training = TrainingArguments(
        output_dir=str(args.out / "training"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, args.steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    Trainer(
        model=model,
        args=training,
        train_dataset=Texts(tokenizer, args.seed),
        data_collator=lambda rows: collate(tokenizer, rows),
    ).train()
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters -> {args.out}")


if __name__ == "__main__":
    main()
