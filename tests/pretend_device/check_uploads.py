"""Run with the pretend device on PYTHONPATH: uploads of tensors of many shapes, dtypes and sizes, from several threads."""

from concurrent.futures import ThreadPoolExecutor

import torch

from model.backends.upload import PinnedUpload, upload

PART_BYTES = 64


def check(device: torch.device) -> None:
    small = PinnedUpload(device, PART_BYTES)

    def copy(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        dtype = (torch.int8, torch.float32, torch.bfloat16, torch.float8_e4m3fn)[number % 4]
        tensor = torch.randint(-128, 128, (number % 7, 1 + number), generator=generator).to(dtype)
        return tensor, small.copy(tensor.T if number % 2 else tensor)

    with ThreadPoolExecutor(3) as pool:
        for number, (tensor, found) in enumerate(pool.map(copy, range(120))):
            assert found.device == device and found.is_contiguous()
            back = found.cpu().T if number % 2 else found.cpu()
            assert torch.equal(back.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), number
    assert torch.npu.read_counts()["deferred copy"] > 200, "copies from pinned memory do not wait"
    there = torch.ones(3, device=device)
    assert upload(there, device) is there
    host = torch.ones(3)
    assert upload(host, torch.device("cpu")) is host


check(torch.device("npu", 0))
check(torch.device("npu", 1))  # not the current device
