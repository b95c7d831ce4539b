"""The extension beside a CUDA build of torch: both halves load and register, the CUDA half for cards that it is for."""

from __future__ import annotations

import torch

from crepa_kernels import resample_tokens
from crepa_kernels.ops import extension, has_extension

OPERATORS = {"resample_tokens", "resample_tokens_adjoint", "layer_norm_resample", "layer_norm_resample_backward_out"}


def registered() -> set[str]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name for name in OPERATORS if has(f"crepa_kernels::{name}", "CUDA")}


def main() -> None:
    assert has_extension("cpu"), extension.why_no_extension("cpu")
    tokens = torch.randn(2, 30 * 52, 7, dtype=torch.float64)
    images = tokens.view(2, 30, 52, 7).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear").flatten(2).mT
    torch.testing.assert_close(resample_tokens(tokens, (30, 52), (16, 16), antialias=False), expected)

    (path,) = extension.FOLDER.glob("_cuda*.so")
    targets, cuda = extension.built_for(path)
    if torch.cuda.is_available():
        assert has_extension("cuda"), extension.why_no_extension("cuda")
        assert registered() == OPERATORS
        return
    # Importing neither asks for a GPU nor loads the half; torch does when it initializes CUDA. Here there is none to
    # initialize, so the call is made with what the cards would answer.
    (call,) = (call for call, _ in torch.cuda._queued_calls if call is extension.register_for_cards)
    assert not has_extension("cuda")
    assert not registered()
    extension.driver_version = lambda: cuda
    extension.usable_cards = lambda: [(5, 0)]
    call()
    reason = f"it was built for {' '.join(targets)}, not for a GPU of compute capability 5.0"
    assert extension.why_no_extension("cuda") == reason
    assert not registered()
    numbers = [int(target.removeprefix("sm_")) for target in targets if target.startswith("sm_")]
    extension.usable_cards = lambda: [(number // 10, number % 10) for number in numbers]
    call()
    assert has_extension("cuda"), extension.why_no_extension("cuda")
    assert registered() == OPERATORS


if __name__ == "__main__":
    main()
