"""The forward pass and the losses written down once more, in float64, head by head and with dense
masks.

Of the model it reads the parameters, the names of their slices and of the last layer's gates, and
the table of n-grams, and nothing else; the tests compare GPT with it, gradients too. What the
n-gram lookup finds is given to it, for every position an entry of each order.
"""

import itertools
import math

import torch
from torch import Tensor

from train_gpt import GPT, LAST_LAYER_GATES, MIX_1, MIX_2, Batch, Config

EPS = torch.finfo(torch.float32).eps
LEAST = 2, 3, 5, 9  # counts of a predicted token where another kind begins

Entry = tuple[int, int, int, int]  # count and token of the first, count and token of the second


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


def small_slices(model: GPT) -> dict[str, Tensor]:
    """The slices of GPT.small, cut one after another in float64."""
    slices, begin = {}, 0
    for name, row in model.small_layout.items():
        count = math.prod(row.shape)
        slices[name] = model.small[begin : begin + count].double().view(row.shape)
        begin += count
    assert begin == len(model.small)
    return slices


def frequencies_and_scale(config: Config, window: int | None) -> tuple[list[float], float]:
    """Of rotary attention in long layers with this window, and of short layers (None). With every
    longer window a frequency that makes one turn or less in the old one becomes slower by the ratio
    of the two, one of 32 turns stays, and the scale grows. The final window brings no change."""
    count, scale = config.head_dim // 4, config.attention_scale
    frequencies = [1024 ** (-i / (count - 1)) for i in range(count)]
    windows = [stage.window_long for stage in (*config.stages, *config.extension)]
    if window is None:
        return frequencies, scale
    for old, new in itertools.pairwise(windows):
        if old == window:
            break
        for i, frequency in enumerate(frequencies):
            share = min(max((old * frequency / 2 / math.pi - 1) / 31, 0), 1)  # of what stays
            frequencies[i] = frequency * share + frequency * old / new * (1 - share)
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


def rotate(x: Tensor, frequencies: list[float]) -> Tensor:
    """One head (positions, head_dim): pairs of the first half turn by position · frequency."""
    half = x.size(1) // 2
    angles = torch.arange(len(x))[:, None] * torch.tensor(frequencies).double()
    turned = torch.view_as_complex(x[:, :half].reshape(len(x), -1, 2))
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles))
    return torch.cat([turned.reshape(len(x), half), x[:, half:]], dim=1)


def probabilities(q: Tensor, k: Tensor, document: Tensor, window: int, scale: float) -> Tensor:
    """(queries, keys) of one head, whose q and k are (positions, head_dim)."""
    position = torch.arange(len(q))
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance <= window) & (document[:, None] == document[None, :])
    return (q @ k.T * scale).masked_fill(~visible, -math.inf).softmax(dim=1)


def documents_of(batch: Batch) -> Tensor:
    document = torch.zeros(len(batch.tokens), dtype=torch.long)
    for start in batch.cu_seqlens.tolist()[1:]:
        document[start:] += 1
    return document


def last_gates(model: GPT, x: Tensor) -> dict[str, Tensor]:
    """Coefficients of the last layer by name, (T, 1) each, from the stream that enters it."""
    small = small_slices(model)
    hidden = x @ small["gate_w_1"].T + small["gate_b_1"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    outputs = 0.1 * (hidden @ small["gate_w_2"].T + small["gate_b_2"])
    assert outputs.size(1) == len(LAST_LAYER_GATES)
    return {name: outputs[:, [i]] for i, name in enumerate(LAST_LAYER_GATES)}


def signed(number: int) -> int:
    """What int64 makes of a number."""
    return (number + 2**63) % 2**64 - 2**63


def ngram_rows(tokens: list[int], orders: tuple[int, ...], num_rows: int) -> list[list[int]]:
    """Of every position, one for each order: in Python's integers, every n-gram by itself."""
    rows = []
    for t in range(len(tokens)):
        rows.append([])
        for i, order in enumerate(orders):
            row = num_rows - 1
            if t - order + 1 >= 0:
                key = 0
                for token in reversed(tokens[t - order + 1 : t + 1]):
                    key = signed((key ^ (token + 1)) * MIX_1)
                    key ^= key >> 29
                mixed = signed(key * MIX_2)
                row = ((mixed >> 20) % 2**44) % (num_rows - 1)
            rows[-1].append(row * len(orders) + i)
    return rows


def cell(number: int, entry: Entry, place: int) -> int:
    """The kind of an entry's first token or second one, of the order of this number."""
    most, _, less, _ = entry
    relation = (3 if place else bool(less)) + (2 * less > most)
    return 25 * number + 5 * relation + sum(entry[2 * place] >= least for least in LEAST)


def best(entries: tuple[Entry, ...]) -> int:
    """The number of the order to go by: the lead of its first token, up to 3, counts as much as two
    orders each; of equals the longest."""
    scores = [(i + 2 * min(x[0] - x[2], 3), i) for i, x in enumerate(entries) if x[0]]
    return max(scores, default=(0, 0))[1]


def kinds_and_tokens(entries: tuple[Entry, ...], *numbers: int) -> list[tuple[int, int]]:
    """Of the tokens that these orders have, at most two each."""
    own = ((number, place) for number in numbers for place in range(2))
    return [
        (cell(number, entries[number], place), entries[number][2 * place + 1])
        for number, place in own
        if entries[number][2 * place]
    ]


def transcribed_hidden(
    model: GPT, batch: Batch, short: int, long: int, found: list[tuple[Entry, ...]] | None = None
) -> Tensor:
    """The normed residual stream in front of the head, (T, dim) float64."""
    config, small, document = model.config, small_slices(model), documents_of(batch)
    head_dim, num_heads = config.head_dim, config.num_heads
    half, last, num_tokens = head_dim // 2, len(config.layers) - 1, len(batch.tokens)
    tokens = batch.tokens.long()

    x0 = rms(model.head[tokens].double())
    e = torch.zeros_like(x0)
    for t, rows in enumerate(ngram_rows(tokens.tolist(), config.ngram_orders, config.ngram_rows)):
        e[t] = model.ngrams.table[rows].double().sum(0)
    vocab = config.padded_vocab_size
    for t, entries in enumerate(found or ()):
        for kind, token in kinds_and_tokens(entries, best(entries)):
            row = model.value_embed[config.num_value_tables * vocab + token].double()
            e[t, : len(row)] += small["match"][kind] * row
    values = [
        model.value_embed[table * vocab + tokens].double()
        for table in range(len(model.value_embed) // vocab)
    ]

    gains = iter(small["ngrams"])
    x = c0 = x0 + next(gains) * e
    after: list[Tensor] = []  # the stream behind every layer
    for i, row in enumerate(config.layers):
        w_1, w_2 = model.mlp_bank[i].double(), model.mlp_bank[last + 1 + i].double()
        if i < last:
            r_mlp, p_mlp = small["mlp_residual"][i], small["mlp_project"][i]
        window = {"short": short, "long": long}[row.window]
        frequencies, scale = frequencies_and_scale(config, {"long": long}.get(row.window))
        weights = model.attention_bank[i].double()
        n = rms(x if row.attend_from is None else after[row.attend_from])
        added = 0 * values[0] if row.value_table is None else values[row.value_table]
        if i == last:
            c_attend, own = after[row.attend_from], last_gates(model, x)
            added = own["value"] * added
            x = own["x_last"] * x + own["x_first"] * c0 + own["x_attend"] * c_attend
            r, p, r_mlp, p_mlp = (
                own[name] for name in ("residual", "project", "mlp_residual", "mlp_project")
            )
        else:
            r, p = small["residual"][i], small["project"][i]
        y = []
        *w_qkv, w_o = weights.chunk(4)
        for h in range(num_heads):
            rows = slice(h * head_dim, (h + 1) * head_dim)
            w_q, w_k, w_v = (part[rows] for part in w_qkv)
            q, k, v = rms(n @ w_q.T), rms(n @ w_k.T), n @ w_v.T + added[:, rows]
            if row.window == "long":  # the half that does not turn is the previous position's
                k = torch.cat([k[:, :half], k[[0, *range(num_tokens - 1)], half:]], 1)
            q, k = rotate(q, frequencies), rotate(k, frequencies)
            seen = probabilities(q, k, document, window, scale)
            y.append(seen @ v)
        x = r * x + p * (torch.cat(y, dim=1) @ w_o)
        if i == last:
            x = x + own["first"] * c0 + own["ngrams"] * e
        elif row.ngrams:
            x = x + next(gains) * e
        x = r_mlp * x + p_mlp * (torch.relu(rms(x) @ w_1.T) ** 2 @ w_2)
        after.append(x)

    return rms(x + small["attended"] * c_attend)


def pointer_attention(
    model: GPT,
    batch: Batch,
    hidden: Tensor,
    reach: int = 8192,
    found: list[tuple[Entry, ...]] | None = None,
) -> tuple[Tensor, Tensor]:
    """What the pointer gives every token of the vocabulary, (T, vocab), and the sink, (T,)."""
    small, document, tokens = small_slices(model), documents_of(batch), batch.tokens.long()
    w_q, w_k = small["pointer"].chunk(2)
    queries, keys = small["pointer_gain"] * rms(hidden @ w_q.T), rms(hidden @ w_k.T)
    to_tokens, to_sink = [], []
    for t, query in enumerate(queries):
        seen = [s for s in range(max(0, t - reach), t) if document[s] == document[t]]
        scores = torch.stack([small["pointer_sink"], *keys[seen]]) @ query / math.sqrt(len(query))
        stand_for = tokens[seen].tolist()
        for kind, token in kinds_and_tokens(found[t], *range(len(found[t]))) if found else ():
            score = small["match_keys"][kind] @ query / math.sqrt(len(query))
            scores = torch.cat([scores, (score + small["match_bias"][kind])[None]])
            stand_for.append(token)
        shares = scores.softmax(0)
        to_sink.append(shares[0])
        none = torch.zeros(len(model.head), dtype=torch.float64)
        to_tokens.append(none.index_add(0, torch.tensor(stand_for).long(), shares[1:]))
    return torch.stack(to_tokens), torch.stack(to_sink)


def next_token_probabilities(
    model: GPT, batch: Batch, hidden: Tensor, found: list[tuple[Entry, ...]] | None = None
) -> tuple[Tensor, Tensor]:
    """Of every position, (T, vocab) float64 each: the pointer's mixture, which predicts the next
    token, and the softmax of the softcapped logits, which predicts the one after it. hidden: the
    normed stream."""
    hidden, copy = hidden.double(), model.config.vocab_size
    logits = 23 / (1 + torch.exp(-(hidden @ model.head.double().T + 5) / 7.5))
    plain = logits.softmax(1)
    to_tokens, to_sink = pointer_attention(model, batch, hidden, found=found)
    alpha, rest = plain[:, [copy]], plain.index_fill(1, torch.tensor(copy), 0)
    rest = rest / rest.sum(1, keepdim=True)
    return rest * (1 - alpha * (1 - to_sink[:, None])) + alpha * to_tokens, plain


def target_losses(
    model: GPT, batch: Batch, hidden: Tensor, found: list[tuple[Entry, ...]] | None = None
) -> Tensor:
    """Cross-entropies in nats at every position of a sequence, (T, 2) float64: of the next token
    and of the one after it; 0 for the target -1 and where there is none."""
    targets, losses = batch.targets.tolist(), []
    terms = targets, [*targets[1:], -1]
    for p, term in zip(next_token_probabilities(model, batch, hidden, found), terms, strict=True):
        of_term = [-p[t, y].log() if y >= 0 else 0 * p[t, 0] for t, y in enumerate(term)]
        losses.append(torch.stack(of_term))
    return torch.stack(losses, 1)
