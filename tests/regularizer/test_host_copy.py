"""Numbers on their way to the host, and tensors on their way to a device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from crepa_kernels.transfer import HostCopy, moved, several_ranks

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_on_a_cpu_numbers_are_at_hand() -> None:
    copy = HostCopy(torch.tensor([0.5, 3.0], dtype=torch.float64))
    assert copy.arrived
    assert copy.read() == copy.read() == [0.5, 3.0]


def test_without_a_process_group_or_alone_in_it_there_are_no_other_ranks() -> None:
    assert not several_ranks()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not several_ranks()
        assert HostCopy(torch.tensor([1.0, 2.0]), over_ranks=True).read() == [1.0, 2.0]
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("over_ranks", [False, True])
def test_neither_host_nor_training_waits_for_the_copy(over_ranks: bool) -> None:
    torch.cuda.set_device(0)
    if over_ranks:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        HostCopy(torch.ones(2, device="cuda"), over_ranks=over_ranks).read()  # makes the communicator
        torch.cuda.set_sync_debug_mode("error")
        torch.cuda._sleep(10**8)
        copy = HostCopy(torch.tensor([1.0, 2.0]).to("cuda", non_blocking=True), over_ranks=over_ranks)
        assert not copy.arrived
        assert copy.read() == [1.0, 2.0]
        assert copy.arrived
    finally:
        torch.cuda.set_sync_debug_mode("default")
        if over_ranks:
            dist.destroy_process_group()


@pytest.mark.gpu
@needs_gpu
def test_what_comes_to_a_cpu_is_there_when_it_is_read() -> None:
    torch.cuda._sleep(10**8)
    assert float(moved(torch.ones(2**22, device="cuda"), torch.device("cpu")).sum()) == 2**22
