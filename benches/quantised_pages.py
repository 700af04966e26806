"""What four bits change in the answers of a trained run's model: rounding, AWQ and NF4 against full precision.

    python -m benches.quantised_pages runs/document_phantom_base-4d003be4

The run must have trained the model itself in full precision. Predictions are compared on the trained tokens of test
conversations, factors are found on training conversations. Research use only, not for diagnosis.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from medvl.base import config
from medvl.evaluation.results import markdown_table
from medvl.language import awq, chat
from medvl.language.awq import AwqConfig
from medvl.language.compare import answer_logits
from medvl.language.encoding import IGNORE
from medvl.systems.run import find_system
from medvl.weights import four_bit, int4
from medvl.weights.int4 import Int4Config
from medvl.weights.lazy import Lazy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--calibration", type=int, default=64, help="training conversations for AWQ")
    parser.add_argument("--test", type=int, default=100, help="test conversations that are compared")
    args = parser.parse_args()
    system = find_system(config.system_of(args.run))
    model, params = system.load(args.run)
    read = system.prepare(model.cfg, print)
    data = chat.encode_conversations(model.chat, read("train")[: args.calibration])
    test = chat.encode_conversations(model.chat, read("test")[: args.test])
    weights = params["model"]

    forms = {"full precision": weights, "NF4": four_bit.quantize(weights)}
    for group in (128, 64, 32):
        rounding = Int4Config(group=group)
        forms[f"rounding, groups of {group}"] = int4.quantize(weights, rounding)
        for name, clip in (("AWQ", False), ("AWQ with clip", True)):
            cfg = AwqConfig(rounding=rounding, clip=clip)
            forms[f"{name}, groups of {group}"] = awq.quantize_awq(model.chat, weights, data, cfg)[0]

    reference = [answer_logits(model, params, test, row) for row in range(len(test.samples))]
    labels = torch.cat([sample.labels[1:][sample.labels[1:] != IGNORE] for sample in test.samples])
    rows = []
    for name, form in forms.items():
        logits = torch.cat(
            [answer_logits(model, {"model": form}, test, row) for row in range(len(reference))]
        )
        rows.append(
            (name, _bytes_per_value(form, forms["NF4"]), *_distances(logits, torch.cat(reference), labels))
        )
        print(rows[-1], flush=True)
    print(markdown_table(("", "bytes per value", "KL", "loss", "same token"), rows))
    print(f"{len(labels)} trained tokens of {len(reference)} test conversations")


def _bytes_per_value(form: dict, quantised: dict) -> float:
    """Of the matrices that NF4 rounds, which all methods round."""
    names = [name for name, weight in quantised.items() if isinstance(weight, Lazy)]
    values = sum(quantised[name].numel() for name in names)
    return sum(form[name].nbytes for name in names) / values


def _distances(
    logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float, float]:
    """(mean KL divergence from the reference, token loss, share of tokens with the same likeliest one)."""
    ours, theirs = F.log_softmax(logits, -1), F.log_softmax(reference, -1)
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    loss = F.nll_loss(ours, labels)
    return float(divergence), float(loss), float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())


if __name__ == "__main__":
    main()
