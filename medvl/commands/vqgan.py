"""`invoke vqgan`: a published VQ model converted once."""

from medvl.hub.checkpoints import check_new_folder
from medvl.hub.vqgan_files import read_vqgan, write_vqgan


def convert(action: str, config: str, ckpt: str, out: str) -> None:
    """Write taming's model.yaml and last.ckpt as a folder of safetensors, and print what it is.

    Raises:
        ValueError: an unknown action; as `read_vqgan` and `write_vqgan`.
    """
    if action != "convert":
        raise ValueError(f"vqgan: the action must be convert, got {action!r}")
    check_new_folder(out)  # before files that are large are read
    cfg, params = read_vqgan(config, ckpt)
    write_vqgan(cfg, params, out)
    numbers = sum(tensor.numel() for tensor in params.values())
    side = cfg.resolution // cfg.stride
    print(
        f"{out}: {cfg.kind}, {len(params)} tensors of {numbers:,} numbers, {cfg.codes:,} codes; an image of "
        f"{cfg.resolution} px is {side} x {side} of them"
    )
