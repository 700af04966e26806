"""`invoke conversations` and `invoke data`: files of conversations in another shape, and public data sets."""

from collections.abc import Sequence

from medvl.base import config, files
from medvl.documents.source_record import SourcesConfig
from medvl.documents.sources import build_data
from medvl.language.conversation_shapes import SHAPES, convert_conversations
from medvl.systems import run


def convert(action: str, source: str, out: str, shape: str, root: str = "") -> None:
    """Write the conversations of a file in another shape.

    Args:
        root: where relative names of its images start; "" = its folder.
    Raises:
        ValueError: as `convert_conversations`.
    """
    if action != "convert" or shape not in SHAPES:
        raise ValueError(
            f"conversations: must be convert with --shape {', '.join(SHAPES)}, got {action!r} and {shape!r}"
        )
    files.check_writable(out)
    number = convert_conversations(source, out, shape, root=root or None)
    print(f"{out}: {number} conversations")


def fetch(exp: str, overrides: Sequence[str] = ()) -> None:
    """Fetch the data sets of an experiment of document, or of the table [data] of a TOML that names no system, and
    write their conversations.

    Args:
        exp: path of a .toml or .json, a name in experiments/, or the folder of a run.
    Raises:
        ConfigError: no such file, no table [data], or one that is no `SourcesConfig`.
        ValueError: as `build_data`.
    """
    path = run.record_of(exp)
    settings = config.override(config.read_settings(path), tuple(overrides), source=str(path))
    if "system" in settings:
        record, _ = run.resolve(str(path), overrides)
        if getattr(record.data, "source", "") != "public":
            raise config.ConfigError(
                f"{path}: fetches no data; an experiment of document does with data.source = 'public'"
            )
        cfg: SourcesConfig = record.data.fetched
    elif isinstance(settings.get("data"), dict):
        cfg = config.structure(settings["data"], SourcesConfig, source=f"{path}, [data]")
    else:
        raise config.ConfigError(
            f"{path}: must have a table [data] with sources, found {', '.join(settings)}"
        )
    files.check_writable(cfg.folder, folder=True)
    summary = build_data(cfg, print)
    if summary["non_commercial"]:
        print("not for commercial use: the licence of a source does not grant it")
