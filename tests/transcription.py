"""The forward pass written down once more, in float64, head by head and with dense masks.

Of the model it reads the parameters, the names of their slices and the table of n-grams, and
nothing else; the tests compare GPT.hidden with it.
"""

import itertools
import math

import torch
from torch import Tensor

from train_gpt import GPT, MIX_1, MIX_2, Batch

EPS = torch.finfo(torch.float32).eps


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


def small_slices(model: GPT) -> dict[str, Tensor]:
    """The slices of GPT.small, cut behind one another in float64."""
    slices, begin = {}, 0
    for name, row in model.small_layout.items():
        count = math.prod(row.shape)
        slices[name] = model.small[begin : begin + count].double().view(row.shape)
        begin += count
    assert begin == len(model.small)
    return slices


def rotary_and_scale(model: GPT, long: int) -> tuple[Tensor, float]:
    """Frequencies and attention scale after YaRN at every change of window until `long`."""
    config = model.config
    count = config.head_dim // 4
    frequencies = [1024 ** (-i / (count - 1)) for i in range(count)]
    scale = config.attention_scale
    windows = [stage.window_long for stage in (*config.stages, *config.extension)]
    windows.append(config.final_window_long)
    for old, new in itertools.pairwise(windows):
        if old == long:
            break
        for i, frequency in enumerate(frequencies):
            s = old / new
            ramp = min(max((old * frequency / (2 * math.pi) - 1) / 31, 0), 1)
            frequencies[i] = frequency * (s + ramp * (1 - s))
        scale *= 1 + 0.2 * math.log(new / old)
    return torch.tensor(frequencies, dtype=torch.float64), scale


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """One head (positions, head_dim): pairs of the first half turn by position · frequency."""
    angles = torch.arange(len(x))[:, None] * frequencies
    half = x.size(1) // 2
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


def gate_outputs(model: GPT, name: str, x: Tensor) -> dict[str, Tensor]:
    """Named outputs, (T, width) each, of one of the gate MLPs."""
    small = small_slices(model)
    hidden = x @ small[f"{name} w_1"].T + small[f"{name} b_1"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    outputs = hidden @ small[f"{name} w_2"].T + small[f"{name} b_2"]
    outputs = outputs * (small[f"{name} scale"] if name in ("early", "late") else 0.1)
    named, begin = {}, 0
    for gate, (width, _) in model.gate_layouts[name].items():
        named[gate] = outputs[:, begin : begin + width]
        begin += width
    assert begin == outputs.size(1)
    return named


def signed(number: int) -> int:
    """What int64 makes of a number."""
    return (number + 2**63) % 2**64 - 2**63


def ngram_rows(tokens: list[int], orders: tuple[int, ...], num_rows: int) -> list[list[int]]:
    """Of every position, one an order: in Python's integers, every n-gram by itself."""
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
            rows[-1].append(i * num_rows + row)
    return rows


def transcribed_hidden(model: GPT, batch: Batch, short: int, long: int) -> Tensor:
    """The normed residual stream in front of the head, (T, dim) float64."""
    config, small, document = model.config, small_slices(model), documents_of(batch)
    dim, head_dim, num_heads = config.model_dim, config.head_dim, config.num_heads
    half, last, num_tokens = head_dim // 2, len(config.layers) - 1, len(batch.tokens)
    frequencies, scale = rotary_and_scale(model, long)
    tokens = batch.tokens.long()

    # Embedding, smear, n-grams
    embedded = model.head[tokens].double()
    smeared = embedded.clone()
    for t in range(1, num_tokens):
        gate = torch.sigmoid(embedded[t, :12] @ small["smear_gate"][0])
        smeared[t] = embedded[t] + small["smear"][0] * gate * embedded[t - 1]
    x0 = rms(smeared)
    e, width = torch.zeros_like(x0), config.ngram_dim
    for t, rows in enumerate(ngram_rows(tokens.tolist(), config.ngram_orders, config.ngram_rows)):
        for i, row in enumerate(rows):
            e[t, i * width : (i + 1) * width] = model.ngrams.table[row]
    vocab = config.padded_vocab_size
    values = [
        model.value_embed[table * vocab + tokens].double()
        for table in range(len(model.value_embed) // vocab)
    ]

    gates = gate_outputs(model, "early", x0)
    x = c0 = x0 + gates["ngrams 0"] * e
    after: list[Tensor] = []  # the stream behind every layer
    attention_layers = [i for i, row in enumerate(config.layers) if row.window != "none"]
    for i, row in enumerate(config.layers):
        w_1, w_2 = model.mlp_bank[i].double(), model.mlp_bank[last + 1 + i].double()
        r, p = small["residual"][i], small["project"][i]
        r_mlp, p_mlp = small["mlp_residual"][i], small["mlp_project"][i]
        own = {}
        if row.skip_from is not None:
            x = x + torch.sigmoid(small["skip"]) * gates[f"skip {i}"] * after[row.skip_from]
        if row.window != "none":
            window = {"short": short, "long": long}[row.window]
            weights = model.attention_bank[attention_layers.index(i)].double()
            attended = x if row.attend_from is None else after[row.attend_from]
            if i == last:
                c_attend, entering = after[row.attend_from], x
                own = gate_outputs(model, "last", x)
                extra = own["value_first"] * c0 + own["value_attend"] * c_attend
                extra = extra + own["value_last"] * x
                x = (1 + own["x_last"]) * x + own["x_first"] * c0 + own["x_attend"] * c_attend
                r, p, r_mlp, p_mlp = (
                    own[name] for name in ("residual", "project", "mlp_residual", "mlp_project")
                )
            n = rms(attended)
            q, k, v = [], [], []
            for h in range(num_heads):
                q_rows = slice(h * head_dim, (h + 1) * head_dim)
                w_q, w_k, w_v, _ = (part[q_rows] for part in weights.split(dim))
                q.append(rms(small["attention_in"][i] * n @ w_q.T))
                k_h = rms(small["attention_in"][i] * n @ w_k.T)
                if row.window == "long":  # the half that does not turn is the previous position's
                    k_h = torch.cat([k_h[:, :half], k_h[[0, *range(num_tokens - 1)], half:]], 1)
                k.append(k_h)
                v_h = small["attention_in"][i] * n @ w_v.T
                if row.value_table is not None:
                    value = values[row.value_table]
                    if i == last:
                        gate = own["value_gate"][:, 0 if h < num_heads // 2 else 1]
                    else:
                        features = torch.cat([n[:, :6], value[:, :6]], dim=1)
                        gate = features @ small["value_gate"][row.value_table, h]
                        gate = 2 * torch.sigmoid(gate)
                    v_h = v_h + gate[:, None] * value[:, q_rows]
                if i == last:
                    v_h = v_h + extra[:, q_rows]
                v.append(v_h)

            q, k = ([rotate(head, frequencies) for head in z] for z in (q, k))
            y = [
                probabilities(q[h], k[h], document, window, scale) @ v[h] for h in range(num_heads)
            ]
            if row.head_gate:
                y = [gates[f"head {i}"][:, [h]] * y[h] for h in range(num_heads)]
            a = small["attention_out"][i] * torch.cat(y, dim=1) @ weights[3 * dim :].T
            x = r * x + p * a
            if i == last:
                x = x + own["first"] * c0 + own["ngrams"] * e
            else:
                x = x + gates[f"first {i}"] * x0
                if i > 0:
                    x = x + gates[f"ngrams {i}"] * e
        x = r_mlp * x + p_mlp * (torch.relu(rms(x) @ w_1.T) ** 2 @ w_2)
        after.append(x)
        if any(later.skip_from == i for later in config.layers):
            c_skip = x
            gates |= gate_outputs(model, "late", x)

    own = gate_outputs(model, "output", x)
    x = x + own["first"] * c0 + own["attend"] * c_attend + own["last"] * entering
    return rms(x + own["value"] * values[0] + own["skip"] * c_skip)


def target_losses(model: GPT, hidden: Tensor, targets: list[int]) -> list[float]:
    """Cross-entropy in nats of a target at every position, from the softcapped logits of the normed
    stream; 0 for the target -1."""
    logits = 23 / (1 + torch.exp(-(hidden.double() @ model.head.double().T + 5) / 7.5))
    lse = logits.exp().sum(dim=1).log()
    return [
        0.0 if target < 0 else (lse[t] - logits[t, target]).item()
        for t, target in enumerate(targets)
    ]
