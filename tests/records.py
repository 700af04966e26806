"""Records of toy experiments with other settings."""

import copy


def with_settings(raw, **settings):
    """A copy of plain settings with some changed: `with_settings(raw, train__batch=2)` sets train.batch."""
    raw = copy.deepcopy(raw)
    for key, value in settings.items():
        *parents, last = key.split("__")
        node = raw
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[last] = value
    return raw
