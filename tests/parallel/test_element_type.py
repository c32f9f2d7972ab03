"""Element types: PyTorch's names and sizes, and no silent comparison with PyTorch's own types."""

import pytest
import torch

from parallel.element_type import ElementType


@pytest.mark.parametrize("kind", list(ElementType), ids=lambda kind: kind.label)
def test_a_type_is_pytorchs_of_the_same_name(kind: ElementType) -> None:
    dtype = kind.torch_dtype
    assert str(dtype) == f"torch.{kind.label}" and dtype.itemsize == kind.itemsize
    assert dtype.is_floating_point == kind.is_floating_point
    assert ElementType.of(dtype) is ElementType.named(kind.label) is kind


def test_a_comparison_with_another_type_is_an_error() -> None:
    """It would be False without a word, and choose the wrong conversion."""
    assert ElementType.INT8 == ElementType.named("int8") != ElementType.UINT8
    for other in (torch.int8, "int8"):
        with pytest.raises(TypeError, match="not an ElementType"):
            assert ElementType.INT8 == other
