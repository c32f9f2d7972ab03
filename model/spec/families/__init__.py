"""Registry of model families: each module of this package defines one ARCHITECTURE."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from model.spec.architecture import Architecture


@functools.cache
def list_architectures() -> Mapping[str, Architecture]:
    """Return all families by their `model_type`, sorted."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {one.model_type: one for one in sorted((module.ARCHITECTURE for module in modules), key=lambda one: one.model_type)}
