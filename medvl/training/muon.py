"""Muon, the optimiser of weight matrices inside a network."""

from collections.abc import Callable

import torch
from torch import Tensor

from medvl.base.tree import Tree, flatten, map_leaves
from medvl.training.optim import Optimizer, Rate, zero_moment
from medvl.weights.shards import is_shard


def muon(
    rate: Callable[[str], Rate],
    schedule: Callable[[int], float] = lambda step: 1.0,
    *,
    momentum: float = 0.95,
    iterations: int = 5,
) -> Optimizer:
    """Momentum whose step on every matrix has all singular values near 1, so that no direction of the
    input waits for another.

    Args:
        rate: parameter name -> Rate; lr is the size of a step per singular value (0.02-0.05), about ten
            times AdamW's.
        schedule: optimiser step (from 0) -> factor on every lr.
        iterations: of the polynomial that brings singular values between 0.7 and 1.2.
    Made for weight matrices inside a network; a convolution's weight is the matrix [out, the rest].
    Norms, biases, embeddings and the last layer belong to AdamW: see `optim.routed`.
    Raises:
        ValueError: a parameter is no matrix, or sharded: a step needs the whole matrix.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon: Nesterov momentum, steps of tall
        matrices times sqrt(rows / columns).
    """

    def init(params: Tree) -> Tree:
        flat = flatten(params)
        vectors = [name for name, tensor in flat.items() if tensor.dim() < 2]
        if vectors:
            raise ValueError(
                f"muon: needs matrices, {len(vectors)} parameters are not, e.g. {vectors[0]}; leave them to "
                "adamw"
            )
        sharded = [name for name, tensor in flat.items() if is_shard(tensor)]
        if sharded:
            raise ValueError(
                f"muon: needs whole matrices, {len(sharded)} are sharded, e.g. {sharded[0]}; leave "
                "them to adamw"
            )
        return {"mean": map_leaves(zero_moment, params)}

    def update(grads: Tree, state: Tree, params: Tree, step: int) -> tuple[Tree, Tree]:
        g, means = flatten(grads), flatten(state["mean"])
        for name, tensor in flatten(params).items():
            r = rate(name)
            lr = r.lr * schedule(step)
            # A sum, not an average: orthogonalisation takes away the scale.
            mean = means[name].mul_(momentum).add_(g[name])
            nesterov = torch.add(g[name], mean, alpha=momentum)
            direction = orthogonalize(nesterov.flatten(1), iterations)
            # A tall matrix spreads a step over more outputs: larger steps keep what an output moves by
            # the same.
            scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
            # Decay is decoupled as in AdamW: by the rate, not through the momentum.
            tensor.mul_(1 - lr * r.weight_decay).add_(direction.view_as(tensor), alpha=-lr * scale)
        return params, state

    return Optimizer(init, update)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of the matrix U S V^T [n, m]: an odd polynomial, applied again and again, drives
    singular values to 0.7-1.2.

    Runs in bfloat16 on a GPU, where that is enough and fast, and in the matrix's own precision elsewhere.
    Source: Jordan et al. 2024, coefficients 3.4445, -4.7750, 2.0315.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    # The smaller side first, so that the squares below are small.
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        x = x.mT
    # The Frobenius norm bounds the largest singular value, so all begin within [0, 1], where the
    # polynomial does not diverge. 1e-7 keeps a zero gradient at zero.
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        # 3.4445 is the slope at 0: by about this factor an iteration raises the smallest singular values.
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    if tall:
        x = x.mT
    return x.to(matrix.dtype)
