"""Register the loader at the moment transformers is ready for it, without making `import hf_prune` slow.

transformers keeps its quantizers in a module whose import takes a second on top of torch's. Whoever imports hf_prune
only for its command line or its configs should not wait for that; whoever loads a model imports it anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


def register_loader() -> None:
    """Register now if transformers has imported its quantizers, else right after it does."""
    if QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _QuantizersFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuantizersFinder())


def _register() -> None:
    try:
        from hf_prune.checkpoint.transformers_hook import register
    except ImportError as error:
        raise ImportError(
            f"hf_prune cannot load checkpoints with this transformers ({error}); it needs transformers >= 5.10. "
            f"Install such a version, or a newer hf_prune."
        ) from error
    register()


class _QuantizersFinder(MetaPathFinder):
    """Finds that one module as Python would, and asks to be called after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, inner: Loader, finder: MetaPathFinder) -> None:
        self.inner, self.finder = inner, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Python's own loader stays on the module, so that `inspect.getsource` and reloading work as ever.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.inner
        self.inner.exec_module(module)
        # Only now: a search for the module, or an import that failed, must not use up the finder.
        sys.meta_path.remove(self.finder)
        _register()
