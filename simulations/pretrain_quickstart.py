"""Pre-train the quick-start's base model on the source text of Python's standard library.

Docstrings, bare strings and long comments are taken out first, so that the documentation which the
quick-start's clients own is new to the model. The result is a Llama-style causal language model
with eight layers and a byte-level BPE tokenizer, under 5 MB in all, and the held-out loss::

    python simulations/pretrain_quickstart.py --out /tmp/quickstart

Seeded: the same Python, torch and number of threads give the same weights. The model in the package
is from Python 3.11.7 with the settings below (13 minutes on one core): held-out loss 3.2757 nats
per token.
"""

import argparse
import ast
import io
import math
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from flower_split.data.stdlib_docs import library_files

EOS, PAD = "<|endoftext|>", "<|pad|>"
LONG_COMMENT = 48  # characters; a shorter comment that stands alone is code's own company
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


def _bare_string_lines(tree: ast.Module) -> Iterator[tuple[int, int, bool]]:
    """First line, last line (from 1) and "is its body's only statement" of every bare string."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.expr) else []:
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement.lineno, statement.end_lineno or 0, len(node.body) == 1  # type: ignore[attr-defined]


def code_only(source: str) -> str:
    """``source`` without docstrings, bare strings, long comments and runs of comment lines.

    Raises:
        SyntaxError: ``source`` is no Python (``tokenize.TokenError`` for some such files).
    """
    lines: list[str | None] = [None, *source.splitlines(keepends=True)]
    for first, last, alone in _bare_string_lines(ast.parse(source)):
        text = lines[first] or ""
        indent = text[: len(text) - len(text.lstrip())]
        if text.lstrip()[:1] in "\"'rRuUbB":  # not "class A: 'doc'", which shares its line
            lines[first : last + 1] = [None] * (last + 1 - first)
            lines[first] = f"{indent}pass\n" if alone else None
    comment_lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start
        line = lines[row]
        if line is None:
            continue
        if line[:column].strip() == "":
            comment_lines.add(row)
        elif len(token.string) > LONG_COMMENT:
            lines[row] = line[:column].rstrip() + "\n"
    for row in comment_lines:
        in_run = row - 1 in comment_lines or row + 1 in comment_lines
        if in_run or len((lines[row] or "").strip()) > LONG_COMMENT:
            lines[row] = None
    return "".join(line for line in lines if line is not None)


def corpus() -> list[str]:
    """The library's files as code only, in the order of their paths; what does not parse is out."""
    documents = []
    for path in library_files():
        try:
            documents.append(code_only(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue
    return [document for document in documents if len(document) > 200]


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has tokens, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(vocab_size: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Eight layers, so that cuts at 2 and 6 leave a bottom, a trunk and a top."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def held_out_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean loss in nats per token over ``rows`` [n, length]."""
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, part) * len(part) for part in rows.split(8)]
    model.train()
    return float(torch.stack(losses).sum() / len(rows))


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of ``rows`` [batch, length + 1]."""
    logits = model(input_ids=rows[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def pretrain(arguments: argparse.Namespace) -> None:
    """Train tokenizer and model, save both, print the held-out loss."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    documents = corpus()
    held_out = documents[::25]
    training = [document for index, document in enumerate(documents) if index % 25]
    tokenizer = train_tokenizer(training, arguments.vocab_size)

    def rows(texts: list[str]) -> torch.Tensor:
        ids = [
            i
            for text in texts
            for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        ]
        width = arguments.sequence_length + 1
        return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)

    train_rows, eval_rows = rows(training), rows(held_out)
    model = build_model(arguments.vocab_size, tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    steps = arguments.tokens // (arguments.batch_size * arguments.sequence_length)
    print(
        f"{len(documents)} files, {train_rows.numel():,} tokens; {count:,} parameters; {steps} steps"
    )

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    order = torch.cat(
        [
            torch.randperm(len(train_rows))
            for _ in range(math.ceil(steps * arguments.batch_size / len(train_rows)))
        ]
    )
    begin = time.monotonic()
    for step in range(steps):
        chosen = order[step * arguments.batch_size : (step + 1) * arguments.batch_size]
        loss = loss_of(model, train_rows[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - begin
            print(f"step {step:5d}  loss {loss.item():.3f}  {seconds:6.1f} s", flush=True)

    out: Path = arguments.out
    model.to(torch.bfloat16).save_pretrained(out)  # half the size
    model.config.dtype = torch.float32  # what it is loaded as
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(out)
    final = held_out_loss(model.float(), eval_rows[:200])
    print(f"held-out loss {final:.4f} nats per token (perplexity {math.exp(final):.1f})")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.2f} MB")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--tokens", type=int, default=3_200_000, help="training tokens in all")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    pretrain(parser.parse_args())


if __name__ == "__main__":
    main()
