"""Whether a host may have an accelerator, by PyTorch's build and the device files of drivers."""

from pathlib import Path

import pytest

from launcher.host import accelerators
from launcher.host.accelerators import may_have_accelerator


@pytest.mark.parametrize(
    ("is_cpu_build", "node", "plugins", "expected"),
    [
        (False, "nvidiactl", (), True),
        (False, "dxg", (), True),
        (False, "kfd", (), True),
        (False, "null", (), False),
        (True, "nvidia0", (), False),
        (True, "davinci_manager", ("json",), True),
        (True, "davinci_manager", ("no_such_plugin",), False),
    ],
)
def test_an_accelerator_needs_a_build_and_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cpu_build: bool, node: str, plugins: tuple[str, ...], expected: bool
) -> None:
    monkeypatch.setattr(accelerators, "is_cpu_build", lambda: is_cpu_build)
    (tmp_path / node).touch()
    assert may_have_accelerator(tmp_path, plugins) is expected
