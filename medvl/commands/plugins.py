"""`invoke plugin`: a published plugin of HealthGPT converted once."""

from medvl.hub.checkpoints import check_new_folder, find_file, read_json
from medvl.hub.plugin_files import open_published, published_config, read_published, write_plugin
from medvl.hub.skeletons import empty_skeleton


def convert(action: str, weights: str, fusion: str, variant: str, task: str, base: str, out: str) -> None:
    """Write HealthGPT's files of a plugin as one folder, and print what they hold.

    Args:
        base: name on the hub or folder of the base; only its config.json is read.
    Raises:
        ValueError: an unknown action, variant or task; as `read_published` and `write_plugin`.
    """
    if action != "convert":
        raise ValueError(f"plugin: the action must be convert, got {action!r}")
    config = published_config(variant, task)
    check_new_folder(out)
    open_published(weights)  # a fusion file alone is refused before the base is looked for
    skeleton = empty_skeleton(read_json(find_file(base or config.base, ("config.json",))), head="language")
    plugin, report = read_published(weights, fusion or None, config=config, skeleton=skeleton, dtype=None)
    write_plugin(plugin, out)
    print(f"{out}: to {task} on {config.base}: {report}")
