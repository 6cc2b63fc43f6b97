"""Continues a text with saved weights: `./run.sh generate CHECKPOINT "Once upon a"`."""

import argparse
import sys
from types import ModuleType

from console import Parser, end_on_signals, number, show

if __name__ == "__main__":
    end_on_signals()

import torch
from check import (
    ROOT,
    START_TOKEN,
    Unjudgeable,
    document_batch,
    final_windows,
    load_checkpoint,
    load_script,
    longest_sequence,
    probabilities,
    script_of,
    token_table,
)

sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from shards import BYTE_TO_ID

# What GPT-2's tokenizer cuts a text by, before it makes tokens of each part.
PRE_TOKENS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def gpt2_encoding():
    """GPT-2's tokenizer, a tiktoken.Encoding, made without the network: of the table of its tokens
    that this repository has. Raises Unjudgeable if that cannot be read."""
    import tiktoken

    import train_gpt  # a third of a second, which bytes do not need

    tokens = token_table(train_gpt).tokens
    ranks, special = {token: i for i, token in enumerate(tokens)}, {"<|endoftext|>": START_TOKEN}
    names = {"pat_str": PRE_TOKENS, "mergeable_ranks": ranks, "special_tokens": special}
    return tiktoken.Encoding("gpt2", **names)


class Tokenizer:
    """Text to tokens and back, as the model has learnt them: single bytes, or GPT-2's."""

    def __init__(self, byte_tokens: bool):
        self.gpt2 = None if byte_tokens else gpt2_encoding()

    def encode(self, text: str) -> list[int]:
        if self.gpt2 is not None:
            try:
                return self.gpt2.encode_ordinary(text)
            except BaseException as error:  # its panics are no Exception
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                start = text[:40]
                raise Unjudgeable(f"GPT-2's tokenizer cannot read {start!r} ...: {error}") from None
        return BYTE_TO_ID[list(text.encode())].tolist()

    def decode(self, tokens: list[int]) -> str:
        if self.gpt2 is not None:
            return self.gpt2.decode(tokens)
        byte_of = {token: byte for byte, token in enumerate(BYTE_TO_ID.tolist())}
        return bytes(byte_of.get(token, ord("?")) for token in tokens).decode(errors="replace")


@torch.no_grad()
def continue_text(
    script: ModuleType, checkpoint: str, text: str, count: int, temperature: float, seed: int
) -> str:
    """The text and up to `count` tokens behind it; a document's end stops it. Temperature 0 takes
    the likeliest token."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config, byte_tokens = load_checkpoint(script, checkpoint, device)
    tokenizer = Tokenizer(byte_tokens)
    tokens = [START_TOKEN, *tokenizer.encode(text)]
    generator = torch.Generator(device).manual_seed(seed)
    windows = final_windows(script, config)
    for _ in range(count):
        context = tokens[-longest_sequence(config) :]
        batch = document_batch(script, config, context, {}, device)
        logits = probabilities(script, model, batch, windows, len(context) - 1)
        logits = logits[: min(config.vocab_size, START_TOKEN + 1)].log()  # ids that stand for text
        if temperature > 0:
            logits = logits.double()  # or a low temperature makes them infinite
            chances = ((logits - logits.max()) / temperature).softmax(dim=-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == START_TOKEN:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[1:])


def utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8: convert it") from None
    return text


def main(arguments: list[str]) -> int:
    parser = Parser(prog="./run.sh generate", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what --checkpoint wrote")
    parser.add_argument("text", type=utf8, metavar="TEXT", help="what is to be continued")
    kind = number(int, 0, sys.maxsize)
    parser.add_argument("--tokens", type=kind, default=128, metavar="N", help="at most [128]")
    text, kind = "0 takes the likeliest token [0.8]", number(float, 0, sys.float_info.max)
    parser.add_argument("--temperature", type=kind, default=0.8, metavar="T", help=text)
    kind = number(int, 0, 2**63 - 2)
    parser.add_argument("--seed", type=kind, default=1337, metavar="N", help="of chance [1337]")
    args = parser.parse_args(arguments)
    try:
        how = args.tokens, args.temperature, args.seed
        script = load_script(script_of(args.checkpoint))
        return show(continue_text(script, args.checkpoint, args.text, *how))
    except Unjudgeable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
