"""Names as LAVIS keeps them."""

from types import SimpleNamespace

registry = SimpleNamespace(mapping={f"{kind}_name_mapping": {} for kind in ("model", "processor", "builder")})


def register(kind, name):
    def add(cls):
        registry.mapping[f"{kind}_name_mapping"][name] = cls
        return cls

    return add
