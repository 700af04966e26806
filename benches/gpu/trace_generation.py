"""What one decoded token costs, counted on the device "meta" (`medvl.training.trace`): without a GPU or weights.

python -m benches.gpu.trace_generation --batch 1 --prompt 1024
"""

import argparse
from typing import Any

import torch

from benches.bench_generate import QWEN2_5_7B
from medvl.hub import skeletons
from medvl.language import cached_forward, sampling
from medvl.training import trace

META = torch.device("meta")


def decoded_token(config: dict[str, Any], batch: int, prompt: int, *, grown: bool = False) -> trace.Work:
    """The work of one greedy token of every row behind prompts without padding, weights in bfloat16.

    Args:
        grown: with transformers' own cache, which copies all it holds for every token.
    """
    skeleton = skeletons.empty_skeleton(config, head="language")
    params = {name: p.detach().to(torch.bfloat16) for name, p in skeleton.module.named_parameters()}
    ids = torch.empty(batch, prompt, dtype=torch.int64, device=META)
    positions = torch.empty(batch, prompt, dtype=torch.int64, device=META)
    tokens = torch.empty(batch, dtype=torch.int64, device=META)
    cfg = sampling.Sampling(max_tokens=256)
    draws = torch.empty(batch, 256, device=META)

    def count(model: torch.nn.Module) -> trace.Work:
        # Not `start_decoding`, which reads the mask.
        call = {"input_ids": ids, "position_ids": positions}
        output = cached_forward.forward_prompt(model, call, 0 if grown else 256)
        decoding = cached_forward.Decoding(
            cache=getattr(output, cached_forward.cache_name(model)),
            logits=output.logits,
            length=prompt,
            mask=None,
            position=positions[:, :1],
        )

        def step() -> None:
            cached_forward.decode_tokens(model, decoding, tokens)
            sampling.choose_tokens(cfg, decoding.logits, draws[:, 0]).clamp(min=0)

        return trace.count_work(step)

    with torch.no_grad():
        return skeleton.run(params, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--gpu", default="h100", choices=sorted(trace.GPUS))
    given = parser.parse_args()
    for name, grown in (("cache grown by cat", True), ("cache with room", False)):
        work = decoded_token(QWEN2_5_7B, given.batch, given.prompt, grown=grown)
        seconds = work.seconds(trace.GPUS[given.gpu])
        print(
            f"{name}: {work.kernels:,.0f} kernels, {work.flops / 1e9:.1f} GFLOP, {work.bytes / 1e9:.2f} GB, "
            f"{seconds * 1e3:.1f} ms on a GPU of type {given.gpu} ({work.launch_seconds * 1e3:.1f} ms of it to launch)"
        )
        print("   ", ", ".join(f"{kernel} {count:.0f}" for kernel, count in work.operations.items()))


if __name__ == "__main__":
    main()
