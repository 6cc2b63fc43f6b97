"""Continues a text with saved weights: `./run.sh generate CHECKPOINT "Once upon a"`."""

import argparse
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from check import ROOT, Unjudgeable, as_windows, load_checkpoint, load_script

sys.path.insert(0, str(ROOT / "data"))

from shards import BYTE_TO_ID


class Tokenizer:
    """Text to tokens and back, as the model has learnt them: single bytes, or GPT-2's."""

    def __init__(self, byte_tokens: bool):
        self.gpt2 = None
        if not byte_tokens:
            import tiktoken

            try:
                self.gpt2 = tiktoken.get_encoding("gpt2")
            except Exception as error:  # noqa: BLE001 (whatever the missing network makes it raise)
                raise Unjudgeable(
                    f"GPT-2's vocabulary cannot be had, which tiktoken fetches once: {error}"
                ) from None

    def encode(self, text: str) -> list[int]:
        if self.gpt2 is not None:
            return self.gpt2.encode_ordinary(text)
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
    tokens = [script.START_TOKEN, *tokenizer.encode(text)]
    generator = torch.Generator(device).manual_seed(seed)
    windows = as_windows(script, config.extension[0].window_short, config.final_window_long)
    for _ in range(count):
        row = torch.tensor(tokens[-config.val_row_tokens :], dtype=torch.int32, device=device)
        ends = torch.tensor([0, len(row)], dtype=torch.int32, device=device)
        x = model.hidden(script.Batch(row, row.long(), ends, len(row)), *windows)
        logits = script.softcap(F.linear(x[-1], model.head))[: config.vocab_size]
        if temperature > 0:
            chances = (logits / temperature).softmax(dim=-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == script.START_TOKEN:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[1:])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run.sh generate", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what --checkpoint wrote")
    parser.add_argument("text", metavar="TEXT", help="what is to be continued")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="at most [128]")
    text = "0 takes the likeliest token [0.8]"
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help=text)
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="of chance [1337]")
    args = parser.parse_args(arguments)
    try:
        how = args.tokens, args.temperature, args.seed
        script = load_script(ROOT / "train_gpt.py")
        print(continue_text(script, args.checkpoint, args.text, *how))
    except Unjudgeable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
